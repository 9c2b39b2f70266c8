"""The numbers of the README: `make bench` measures them and writes results.json and the README's table."""
