"""What we measure: each file prints a table, then one line of JSON; results/ has figures and the machines they came from."""
