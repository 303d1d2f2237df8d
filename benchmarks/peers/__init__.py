"""What benchmarks/peers.py is made of: environments, weights, rows, visits, report. Workers run in the peers' own."""
