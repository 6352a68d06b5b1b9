"""`ebb bench`: how fast it trains, reads and writes, next to what the machine can do at all."""
