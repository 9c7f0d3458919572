"""An attack on difflex: every command on damaged, full, forbidden and foreign disks, killed, and twice at once.

`python -m tests.attack` from the root of the project runs it; `make attack` does the same.
"""
