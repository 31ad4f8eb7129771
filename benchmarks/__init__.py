"""What we measure: each file prints a table, then one line of JSON. Results with the machine's description lie in results/."""
