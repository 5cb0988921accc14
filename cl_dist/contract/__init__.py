"""The contract suite: tests that every method has to pass, also one of another package.

python -m pytest -p cl_dist.contract.plugin --pyargs cl_dist.contract --method my_pkg.probe:METHOD
"""
