"""Deformities and variants of a phantom's spine: each function takes the stacked bodies and returns changed ones.

Bodies are listed from the top down, as by `stack_spine`, and named from the sacrum up. What is above a changed body
moves with it, so the column stays connected; `upright` restores its posture.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from data_prep.phantom.spine import SACRUM, Body, turned

_ABOVE_L5 = ("L4", "L3", "L2", "L1", "T12", "T11", "T10")


def bent(bodies: list[Body], aside_mm: float, period_mm: float, phase: float) -> list[Body]:
    """Scoliosis: a sine wave sideways, `aside_mm` to the left and to the right, added to the spine's own bend.

    It is centred, so that the canal, which tells bodies from arches, does not leave the stack of slices.
    """
    at = np.array([2 * np.pi * body.centre[0] / period_mm + phase for body in bodies])
    wave = np.sin(at) - (np.sin(at).max() + np.sin(at).min()) / 2
    amplitude = aside_mm / wave.max()
    aside, lean = amplitude * wave, amplitude * np.cos(at) * 2 * np.pi / period_mm
    return [
        replace(
            body,
            centre=body.centre + np.array([0.0, 0.0, aside[k]]),
            shear=(body.shear[0] - float(lean[k]), body.shear[1]),
        )
        for k, body in enumerate(bodies)
    ]


def slipped(bodies: list[Body], name: str, slip_mm: float) -> list[Body]:
    """Listhesis: a body, and what is above, slides forward along its own lower endplate, so the disc stays open."""
    k = _index(bodies, name)
    backwards = replace(bodies[k], angle_deg=_lower_end_deg(bodies[k])).axes[0]
    above = [_moved(body, -slip_mm * backwards) for body in bodies[: k + 1]]
    above[k] = replace(above[k], slip_mm=float(slip_mm))
    return above + bodies[k + 1 :]


def narrowed(bodies: list[Body], name: str, height_mm: float) -> list[Body]:
    """The disc below a body made `height_mm` high, between parallel endplates."""
    k = _index(bodies, name)
    upper, lower = bodies[k], bodies[k + 1]
    gap = lower.top - upper.bottom
    shift = (1 - height_mm / np.linalg.norm(gap)) * gap
    turn_deg = _upper_end_deg(lower) - _lower_end_deg(upper)
    return [_moved(_turned_about(body, turn_deg, upper.bottom), shift) for body in bodies[: k + 1]] + bodies[k + 1 :]


def wedged(bodies: list[Body], name: str, loss: float) -> list[Body]:
    """A wedge fracture: the front wall loses this fraction of its height; the back wall and the lower endplate stay."""
    k = _index(bodies, name)
    old = bodies[k]
    upper, lower = old.half_depth
    front = 2 * old.half_height + old.slope * (upper + lower)
    back = 2 * old.half_height - old.slope * (upper + lower)
    front *= 1 - loss
    wedge_deg = float(2 * np.rad2deg(np.arctan((front - back) / (2 * (upper + lower)))))
    angle_deg = _lower_end_deg(old) - wedge_deg / 2
    new = replace(old, half_height=float((front + back) / 4), wedge_deg=wedge_deg, angle_deg=angle_deg)
    new = _moved(new, old.corners[2] - new.corners[2])
    turn_deg, pivot = _upper_end_deg(new) - _upper_end_deg(old), old.corners[1]
    above = [_moved(_turned_about(body, turn_deg, pivot), new.corners[1] - pivot) for body in bodies[:k]]
    return [*above, new, *bodies[k + 1 :]]


def sunken(bodies: list[Body], name: str, depth_mm: float) -> list[Body]:
    """A biconcave fracture: the middles of both endplates sink by `depth_mm`; the corners stay."""
    k = _index(bodies, name)
    return [*bodies[:k], replace(bodies[k], sunk_mm=float(depth_mm)), *bodies[k + 1 :]]


def with_extra_body(bodies: list[Body]) -> list[Body]:
    """One lumbar body more (L6): the lower lumbar curve is continued once. The lowest is named L5, the topmost T10."""
    k = _index(bodies, "L5")
    l4, l5 = bodies[k - 1 : k + 1]
    turn_deg, step = l5.angle_deg - l4.angle_deg, l5.centre - l4.centre

    def continued(body):
        return _moved(_turned_about(body, turn_deg, l4.centre[:2]), step[:2])

    like_l4 = replace(l4, centre=l5.centre, angle_deg=l5.angle_deg, shear=l5.shear)
    above = [replace(body, name=name) for body, name in zip([*bodies[:k], like_l4], _ABOVE_L5[::-1], strict=True)]
    return above + [continued(body) for body in bodies[k:]]


def lumbarised(bodies: list[Body], disc_mm: float) -> list[Body]:
    """A lumbarised S1: one mobile body more, tapered and less wedged like S1, with a real though low disc below it."""
    bodies = with_extra_body(bodies)
    k = _index(bodies, "L5")
    depth = bodies[k].half_depth[0]
    bodies[k] = replace(bodies[k], half_depth=(depth, 0.85 * depth), wedge_deg=0.5 * bodies[k].wedge_deg)
    return narrowed(bodies, "L5", disc_mm)


def sacralised(bodies: list[Body], disc_mm: float) -> list[Body]:
    """A sacralised L5, part of the sacrum and named S1: squarer than an S1, with a remnant of its disc below."""
    k = _index(bodies, "S1")
    s1, s2, s3 = bodies[k:]
    depth = s1.half_depth[0]
    s1 = replace(s1, half_depth=(depth, 0.88 * depth), wedge_deg=6.0)
    s1 = _moved(s1, bodies[k].top - s1.top)
    s2 = replace(s2, half_depth=(0.85 * depth, 0.62 * depth), half_height=1.15 * s2.half_height)
    s3 = replace(s3, half_depth=(0.60 * depth, 0.50 * depth))
    s2 = _moved(s2, s1.bottom + disc_mm * s1.axes[1] - s2.top)
    s3 = _moved(s3, s2.bottom + 2.4 * s2.axes[1] - s3.top)
    return [*bodies[:k], s1, s2, s3]


def upright(bodies: list[Body], mean_deg: float) -> list[Body]:
    """The whole spine rotated so that the mean angle of its mobile bodies is `mean_deg`."""
    return [turned(body, mean_deg - mean_angle_deg(bodies)) for body in bodies]


def mean_angle_deg(bodies: list[Body]) -> float:
    """The mean angle of the bodies above the sacrum."""
    return float(np.mean([body.angle_deg for body in bodies if body.name not in SACRUM]))


def _index(bodies, name):
    return next(k for k, body in enumerate(bodies) if body.name == name)


def _upper_end_deg(body):
    return body.angle_deg - body.wedge_deg / 2


def _lower_end_deg(body):
    return body.angle_deg + body.wedge_deg / 2


def _moved(body, shift: Float[np.ndarray, "2"]):
    """A body moved by (y, x) mm."""
    return replace(body, centre=body.centre + np.append(shift, 0.0))


def _turned_about(body, angle_deg, point):
    return _moved(turned(_moved(body, -point), angle_deg), point)
