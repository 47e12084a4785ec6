"""How sums over calibration examples are filled within memory, disk, time and processes."""
