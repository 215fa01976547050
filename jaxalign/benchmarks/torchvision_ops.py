"""torchvision's extension is built for CUDA's torch; beside a CPU torch its import wants two schemas to be there."""


def define():
    """Define torchvision::nms and ::qnms where nothing has; keep the result, the schemas live as long. None: no torch.

    To be called before torchvision, transformers or diffusers are imported.
    """
    try:
        import torch
    except ImportError:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
