"""torch.compile of the layers, for GPUs."""

from lalia.errors import UserError
from lalia.model.transformer import Transformer


def compile_layers(model: Transformer) -> None:
    """Compile each layer, in place; the names of the weights stay.

    All layers share one compilation, because they have one code and their shapes agree. On a CPU our own functions make
    few passes already, and compiling takes longer than a short run: there it is refused.

    Raises:
        UserError: if the model is not on a GPU.
    """
    if model.device.type != "cuda":
        raise UserError(
            f"compilation is for GPUs, the model is on {model.device.type}; set pretrain.compile = false, or run where "
            "torch.cuda.is_available()"
        )
    for layer in model.layers:
        layer.compile(dynamic=False)
