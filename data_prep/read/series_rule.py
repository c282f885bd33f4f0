"""One series of each patient, where several fit."""

from collections import defaultdict

from data_prep.read.found import Found, LeftOut, Series
from data_prep.read.series import with_aliases


def one_of_each_patient(found: Found, rule: str) -> Found:
    """Leave out all but one series of each patient.

    Args:
        found: what was found; it is changed.
        rule: "newest", "thickest" (its slices), or "all", which leaves none out.
    """
    of_patient: dict[str, list[Series]] = defaultdict(list)
    for one in found.series if rule != "all" else ():
        of_patient[one.patient].append(one)
    for several in of_patient.values():
        ranks: dict[str, tuple] = {
            one.key: (one.facts.date, one.facts.time) if rule == "newest" else one.facts.spacing_mm[2:]
            for one in several
        }
        if len(several) > 1 and not all(rank and rank[0] for rank in ranks.values()):
            what = "date" if rule == "newest" else "slice spacing"
            reason = f"--series-rule {rule}: not every series of its patient has a {what}. Choose one in an inventory."
            found.failed += [LeftOut(one.name, f"{one.name}: {reason}", one.files, one.facts, one) for one in several]
            found.series = [one for one in found.series if one not in several]
        elif len(several) > 1:
            chosen = max(several, key=lambda one: (ranks[one.key], one.facts.num_slices, one.key))
            reason = f"--series-rule {rule}: {chosen.name} of the same patient is read"
            others = [one for one in several if one is not chosen]
            found.left_out += [LeftOut(one.name, reason, one.files, one.facts, one) for one in others]
            found.series = [one for one in found.series if one not in others]
    found.series = with_aliases(found.series)
    return found
