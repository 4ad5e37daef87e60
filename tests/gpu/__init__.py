"""What a real GPU can show: `make test-gpu`."""
