"""The tables of `python model.py`: layers, parameters and FLOPs of a network on torch's meta device."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from continuation.context import Context


def layer_rows(model) -> list[tuple[str, str, str, int]]:
    """List (name, type, output shape, parameters) of every layer with weights, and of pooling, for one chunk of
    audio. The model is on the meta device, where only shapes are computed."""
    rows, hooks = [], []
    for name, module in model.named_modules():
        count = sum(p.numel() for p in module.parameters())
        is_leaf = not any(module.children()) or isinstance(module, nn.MultiheadAttention)
        if is_leaf and (count or isinstance(module, nn.MaxPool1d)) and not name.endswith("out_proj"):
            kind = type(module).__name__

            def note(_module, _inputs, output, name=name, kind=kind, count=count):
                output = output[0] if isinstance(output, tuple) else output
                rows.append((name, kind, " x ".join(str(size) for size in output.shape[1:]), count))

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        x = chunk_on_meta(model.config)
        model.encode(x)
        predicted = model.predict(context_on_meta(model.config), steps=1)
        model.decode(predicted, copies=model.copies(x))
    for hook in hooks:
        hook.remove()
    return rows


def chunk_on_meta(config) -> Tensor:
    return torch.zeros(1, config.channels, config.chunk_samples, device="meta")


def context_on_meta(config) -> Context:
    shapes = config.pair_shapes
    latents, outlook = (torch.zeros(1, *shapes[part], device="meta") for part in ("context", "outlook"))
    return Context(latents, outlook if config.has_copies else None)


def gigaflops(model) -> dict[str, float]:
    """Count the GFLOPs (2 per multiply-add) of one forward pass of each stage and of generating a chunk, of
    convolutions, matrix products and attention; FFTs and elementwise operations are not counted."""

    def count(run) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e9

    chunk, context = chunk_on_meta(model.config), context_on_meta(model.config)
    copies = model.copies(chunk)
    encoding = count(lambda: model.encode_context(chunk))
    decoding = count(lambda: model.decode(context.latents, copies=copies))
    return {
        "stage 1, encode and decode 10 s": count(lambda: model.reconstruct(chunk)),
        "stage 2, the core on 10 s + 10 s": count(lambda: model.predict(context, steps=1)),
        "one generation of 10 s": encoding + count(lambda: model.predict(context)) + decoding,
    }


def print_tables(name: str, model) -> None:
    """Print layers, parameters and FLOPs of a model on the meta device."""
    config = model.config
    rate, channels, latents = config.sample_rate, config.latent_channels, config.chunk_latents
    print(f"\n{name}: {rate} Hz, {config.channels} channels, latents {channels} x {latents} for 10 s")
    for layer, kind, shape, count in layer_rows(model):
        print(f"  {layer:34} {kind:32} {shape:>18} {count:12,}")
    parts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    for part, count in [*parts.items(), ("total", sum(p.numel() for p in model.parameters()))]:
        print(f"  {part:86} {count:12,} parameters")
    for what, count in gigaflops(model).items():
        print(f"  {what:86} {count:12.1f} GFLOPs")
