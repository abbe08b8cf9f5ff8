"""Run by test_steps.py in an interpreter of its own, which has two CPU devices: what the model cut
over both gives, as JSON on the last line."""

import json

from stepping import make_runner
from test_steps import SPEC, a_bit_of_everything

if __name__ == "__main__":
    runner = make_runner(SPEC, shards=2)
    assert len(runner.slabs["kv"].sharding.device_set) == 2
    print(json.dumps(a_bit_of_everything(runner)))
