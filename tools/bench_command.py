"""`quire bench NAME`: measurements. Each is a module of tools/bench."""


def add_arguments(parser):
    pass


def run(args):
    pass
