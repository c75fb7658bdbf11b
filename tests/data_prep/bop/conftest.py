"""`pytest tests/data_prep/bop --real-data DIR`: the same questions to a dataset of yours."""


def pytest_addoption(parser):
    what = "split of BOP scenes, or folder of tar shards, beside its models"
    parser.addoption("--real-data", default=None, metavar="DIR", help=what)
