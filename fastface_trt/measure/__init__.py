"""What every measurement shares: statistics, tables, figures and the machine's description."""
