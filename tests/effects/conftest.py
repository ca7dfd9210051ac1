"""Its place lets the tests in the folders below import `faults` and `small_run`."""
