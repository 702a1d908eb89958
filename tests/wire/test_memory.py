"""A tensor of 100 million weights: what encoding and decoding need beside the tensor and the payload."""

import json
import subprocess
import sys

import pytest

# resident memory, so that buffers inside the coders count; a process of its own, so that nothing else does
SCRIPT = """
import json, resource, sys
import torch
from secateur.wire.codec import decode, encode
from secateur.wire.message import Expected, Message

def peak():
    # of this program alone: ru_maxrss begins with what the process had before it became this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

density = float(sys.argv[1])
warm = Message({"w": torch.rand(100_000)}, {"w": torch.rand(100_000) < 0.5})
decode(encode(warm), Expected.of(warm.tensors, mask="optional"))
before = now()
generator = torch.Generator().manual_seed(0)
w = torch.empty(100, 1_000_000)
for row in w:  # in pieces: the peak must be the codec's
    row.normal_(generator=generator)
mask = None
if density < 1:
    mask = {"w": torch.empty(100, 1_000_000, dtype=torch.bool)}
    for row, kept in zip(w, mask["w"]):
        kept.copy_(torch.rand(1_000_000, generator=generator) < density)
        row.masked_fill_(~kept, 0.0)
made = peak()
message = Message({"w": w}, mask)
data = encode(message)
encoded = peak()
expected = Expected.of(message.tensors, mask="optional")
del message
check = [row.sum().item() for row in w]
del w, mask
back = decode(data, expected)
assert [row.sum().item() for row in back.tensors["w"]] == check
print(json.dumps({"payload": len(data), "encode": encoded - before, "decode": peak() - before, "made": made - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_a_hundred_million_weights_take_three_times_payload_and_tensor_at_most(density):
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(density)], check=True, capture_output=True, text=True, timeout=300
    )
    found = json.loads(out.stdout)
    bound = 3 * (found["payload"] + 400_000_000)
    assert found["made"] < bound  # else the message itself was made too wastefully for the test to mean anything
    assert found["encode"] <= bound
    assert found["decode"] <= bound
