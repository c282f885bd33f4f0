"""Phantoms as jobs: synthetic patients, split and cut into discs exactly as real ones are."""

from functools import partial

from data_prep.build import Job
from data_prep.discs import DiscVolume, extract_discs
from data_prep.phantom import phantom, phantom_labels
from data_prep.scan import Scan
from data_prep.splits import split_patients
from data_prep.vertebrae import bodies_from_spider_mask, body_labels
from spinejax.errors import SpinejaxError

_MAX_PATIENTS = 100_000  # names have five digits


def phantom_jobs(num_patients: int, *, seed: int) -> list[Job]:
    """One job for each of the patients p00000, p00001, …

    Raises:
        SpinejaxError: the number or the seed is out of range.
    """
    names = phantom_names(num_patients, seed)
    labels = {name: phantom_labels(seed, patient) for patient, name in enumerate(names)}
    splits = split_patients({name: levels.values() for name, levels in labels.items()}, seed=seed)
    return [
        Job(
            name=name,
            patient=name,
            scan=name,
            split=splits[name],
            labels=labels[name],
            cut=partial(cut_phantom, seed, patient),
            recipe=f"phantom {seed} {patient}",
        )
        for patient, name in enumerate(labels)
    ]


def phantom_names(num_patients: int, seed: int) -> list[str]:
    """p00000, p00001, … Raises SpinejaxError if the number or the seed is out of range."""
    if not 1 <= num_patients <= _MAX_PATIENTS or seed < 0:
        raise SpinejaxError(
            f"--patients {num_patients}, --seed {seed}: expected 1 to {_MAX_PATIENTS} patients, a seed of 0 or more."
        )
    return [f"p{patient:05d}" for patient in range(num_patients)]


def cut_phantom(seed: int, patient: int) -> tuple[list[DiscVolume], list[str]]:
    """A phantom's disc volumes, found by way of its mask as in a real scan, and notes on what was left out."""
    drawn = phantom(seed, patient)
    bodies, notes = bodies_from_spider_mask(drawn.mask)
    regions = Scan(body_labels(drawn.mask), drawn.mask.affine, drawn.mask.name)
    return extract_discs(drawn.scan, bodies, regions=regions, lesions=drawn.lesions), notes
