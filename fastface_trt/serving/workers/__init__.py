"""Workers in child processes, one per device, behind one queue."""
