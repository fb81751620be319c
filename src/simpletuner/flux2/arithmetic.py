"""How much a training step computes: the multiplications of matrices, which are nearly all of it."""

from simpletuner.flux2.activations import Pass


def training_flop(passing: Pass) -> int:
    """Floating point operations of one forward and backward pass, a multiply-add being two.

    In both kinds of block the matrices have 4·hidden² + 3·hidden·inner numbers for each of its tokens; attention
    takes 4·tokens²·hidden. Backwards a matrix costs as much as forwards (twice that where it learns), attention twice
    that, and what is recomputed once more. Left out, together below a fiftieth of dev's: adapters, norms, modulation.
    """
    spec = passing.spec
    hidden, learning = spec.hidden, 2 if passing.is_full else 1
    block_numbers = 4 * hidden**2 + 3 * hidden * spec.mlp_hidden
    total = 0
    for index in range(spec.blocks):
        image = passing.image
        for route in passing.routes:
            if route.start <= index <= route.end:
                image = route.keeps(image)
        tokens = passing.text + image
        matrices, attention = 2 * tokens * block_numbers, 4 * tokens**2 * hidden
        again = 1 if passing.recomputed and passing.recomputed[index] else 0
        total += matrices * (1 + learning + again) + attention * (1 + 2 + again)
    ends = 2 * hidden * (2 * passing.image * spec.in_channels + passing.text * spec.context_dim)
    return passing.batch * (total + ends * (1 + learning))
