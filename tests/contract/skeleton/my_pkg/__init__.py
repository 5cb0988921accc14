"""A method of another package: a linear probe per task on a frozen backbone."""
