"""A generator of modules as odd as users have them: shared, tied, complex, empty, in odd memory."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


class Odd(nn.Module):
    """A module of some parts; built again from the same plan it is the same."""

    def __init__(self, parts, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def values(*shape, dtype=torch.float32):
            kind = dtype if dtype.is_complex else torch.float64
            return torch.randn(shape, generator=generator, dtype=kind).to(dtype)

        for i, (kind, dtype) in enumerate(parts):
            name = f"{kind}{i}"
            if kind == "plain":
                setattr(self, name, nn.Parameter(values(2, 3, dtype=dtype)))
            elif kind == "scalar":
                setattr(self, name, nn.Parameter(values(dtype=dtype)))
            elif kind == "empty":
                setattr(self, name, nn.Parameter(values(0, 3, dtype=dtype)))
            elif kind == "transposed":
                setattr(self, name, nn.Parameter(values(4, 2, dtype=dtype).t()))
            elif kind == "strided":
                setattr(self, name, nn.Parameter(values(3, 4, dtype=dtype)[:, ::2]))
            elif kind == "buffer":
                self.register_buffer(name, values(3, dtype=dtype))
            elif kind == "passing":
                self.register_buffer(name, values(2, dtype=dtype), persistent=False)
            elif kind == "count":
                self.register_buffer(name, torch.tensor(i))
            elif kind == "none":
                self.register_buffer(name, None)
            elif kind == "frozen":
                setattr(self, name, nn.Parameter(values(2, dtype=dtype), requires_grad=False))
            elif kind == "tied":
                setattr(self, f"{name}a", nn.Parameter(values(2, dtype=dtype)))
                setattr(self, f"{name}b", getattr(self, f"{name}a"))
            elif kind == "shared":
                setattr(self, f"{name}a", nn.Sequential(nn.Linear(2, 2)))
                setattr(self, f"{name}b", nn.ModuleList([getattr(self, f"{name}a")[0]]))
            elif kind == "parametrised":
                setattr(self, name, parametrizations.weight_norm(nn.Linear(2, 2)))
        self.anchor = nn.Parameter(values(2))  # something to average is always there


KINDS = (
    *("plain", "scalar", "empty", "transposed", "strided", "buffer", "passing", "count", "none"),
    *("frozen", "tied", "shared", "parametrised"),
)

odd_plans = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(DTYPES)), max_size=6)
"""Plans of odd modules: ``Odd(plan)`` builds one."""


def walk_randomly(module, generator):
    """Move every parameter and floating-point buffer, each once."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() or tensor.is_complex():
                step = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(step.to(tensor.dtype))
