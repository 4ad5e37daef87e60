"""One client attacks the server while another makes pictures and a prober asks whether it lives."""
