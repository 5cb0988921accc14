"""The command line, recipes and reports of cl-dist; algorithms are in cl_dist."""
