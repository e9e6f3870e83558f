"""torch.compile of the layers."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lalia.errors import UserError
from lalia.model.transformer import Transformer


def compile_layers(model: Transformer) -> None:
    """Compile each layer, in place; the names of the weights stay.

    All layers of one kind share one compilation, because they have one code and their shapes agree. What is compiled is
    kept (in TORCHINDUCTOR_CACHE_DIR, by default in the folder for temporary files), so the next start takes seconds.

    Raises:
        UserError: if the model is on a CPU and there is no C++ compiler.
    """
    if model.device.type == "cpu" and find_compiler() is None:
        raise UserError(
            "compilation for a CPU needs a C++ compiler, and there is neither g++ nor clang++ here; install one (set "
            "CXX if it has another name), or set pretrain.compile = false"
        )
    for layer in model.layers:
        layer.compile(dynamic=False)


def find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would call; None if there is none."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def compiler_failure(error: RuntimeError) -> str | None:
    """The first line of what torch.compile says where it cannot compile; None if the error is another one."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def uncompiled(compiled: bool) -> Iterator[None]:
    """Run what is compiled as it is written: other shapes than those of training would be compiled anew, each."""
    if not compiled:  # the compiler's import takes 2 s
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
