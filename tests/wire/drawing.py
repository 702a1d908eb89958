"""Messages for property tests: every dtype, densities 0 to 1, empty and 0-d tensors, dead units, masks held before."""

import torch
from hypothesis import strategies as st

from secateur.wire.message import Message

DTYPES = (torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)
SCALARS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=9)),
    max_size=3,
)


def _tensor(shape, dtype, generator):
    value = torch.randn(shape, generator=generator) * 3
    return value > 0 if dtype == torch.bool else value.abs().to(dtype) if dtype == torch.uint8 else value.to(dtype)


def _mask(draw, shape, generator):
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.03, 0.3, 0.97, 1.0]))
    if len(shape) >= 2 and draw(st.booleans()):
        mask[torch.rand(shape[0], generator=generator) < 0.5] = False
        mask[:, torch.rand(shape[1], generator=generator) < 0.3] = False
    return mask


@st.composite
def messages(draw, largest=12):
    """Return a message, and a mask (or None) that its receiver may hold: the same, one near it, or another."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tensors, mask, held = {}, {}, {}
    for n in draw(st.permutations(range(draw(st.integers(0, 3))))):
        shape = tuple(draw(st.lists(st.integers(0, largest), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        tensor = _tensor(shape, dtype, generator)
        if draw(st.booleans()):
            mask[f"t{n}"] = _mask(draw, shape, generator)
            tensor = torch.where(mask[f"t{n}"], tensor, torch.zeros((), dtype=dtype))
            other = draw(st.sampled_from(["same", "near", "other", "none"]))
            flips = torch.rand(shape, generator=generator) < 0.02
            if other != "none":
                near = {"same": mask[f"t{n}"], "near": mask[f"t{n}"] ^ flips}
                held[f"t{n}"] = near[other] if other in near else _mask(draw, shape, generator)
        tensors[f"t{n}"] = tensor
    masked = bool(mask) or draw(st.booleans())
    return Message(tensors, mask if masked else None, draw(SCALARS)), held if draw(st.booleans()) else None
