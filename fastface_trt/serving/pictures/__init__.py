"""Pictures that clients send, and what is done about those that are sent back."""
