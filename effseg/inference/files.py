"""Scans of a folder to label files."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from effseg.data.cases import Case, Found, case_of, look_for_cases
from effseg.data.identity import case_identity
from effseg.data.listing import nifti_suffix
from effseg.data.nifti import Scan, read_image, write_labels
from effseg.data.origin import checksum, made_by
from effseg.data.selection import listed
from effseg.errors import InputError
from effseg.inference.predictor import Segmenter

OnCase = Callable[[Path, Scan, float], None]


def predict_files(
    predictor: Segmenter,
    source: Path,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    writes: bool = True,
    on_case: OnCase | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Segment a scan file, or every scan of a folder, to label files on the scans' own grids.

    output: a folder for NAME.nii.gz, or, for one scan, a file name that ends in .nii.gz or .nii.
    resume: leave label files that this network, with these settings, has made of these scans before.
    writes: False in all but one of the processes that share volumes.
    on_case: told of every file written, with its scan and the seconds it took. say: told what was left.
    Returns the files written.
    Raises InputError before anything is computed where there is no scan, two scans would write one file, or
    an output exists (unless `overwrite`, or finished and `resume`) or is an input. A scan of several that is
    missing or cannot be used does not stop the others: they are written, and then the error names it.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    found = Found([case_of(source)]) if source.is_file() else look_for_cases(source, labelled=False)
    failures = list(found.missing.values())
    if found.segmented:
        say(f"no scans, but label files of effseg predict: {listed([path.name for path in found.segmented])}")
    targets = _targets(found.cases, source, output) if found.cases else []
    todo = _unfinished(predictor, list(zip(found.cases, targets, strict=True)), overwrite, resume)
    if len(todo) < len(targets):
        say(f"{len(targets) - len(todo)} of {len(targets)} scans were segmented before")
    names = dict(zip(predictor.label_map.values[1:], predictor.label_map.names[1:], strict=True))
    written = []
    for case, target in todo:
        start = time.perf_counter()
        try:
            scan = read_image(case.images)
            labels = predictor(scan)
        except InputError as error:
            failures.append(str(error))
            continue
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            failures.append(f"{case.images[0]}: does not fit in main memory")
            continue
        if not writes:
            continue
        write_labels(target, labels, scan.grid, names, _origin(predictor, case))
        written.append(target)
        if on_case is not None:
            on_case(target, scan, time.perf_counter() - start)
    if failures:
        total = len(found.cases) + len(found.missing)
        many = f"{len(failures)} of {total} scans were not segmented: " if total > 1 else ""
        raise InputError(many + "; ".join(failures))
    return written


def _unfinished(
    predictor: Segmenter, pairs: list[tuple[Case, Path]], overwrite: bool, resume: bool
) -> list[tuple[Case, Path]]:
    """What is to be done; raises InputError where a file is in the way."""
    todo = []
    for case, target in pairs:
        exists = target.exists() or target.is_symlink()
        finished = exists and resume and made_by(target) == _origin(predictor, case)
        if exists and not finished and not overwrite:
            why = "--overwrite replaces it"
            if resume:
                why = "and not made of this scan by this network with these settings; " + why
            else:
                why += ", --continue leaves it if it is finished"
            raise InputError(f"{target}: exists already; {why}")
        if not finished:
            todo.append((case, target))
    return todo


def _origin(predictor: Segmenter, case: Case) -> str:
    """A checksum of what makes a label file: network, settings, scan."""
    try:
        identity = case_identity(Case(case.name, case.images))
    except InputError:  # reading the scan will say so
        identity = {}
    return checksum(predictor.fingerprint, identity)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _targets(cases: Sequence[Case], source: Path, output: Path) -> list[Path]:
    """Where each case's labels go; raises InputError where one may not go there."""
    if nifti_suffix(output.name) and not output.is_dir():
        if not source.is_file():
            raise InputError(f"{output}: expected a folder, for the scans of {source} go into one")
        targets = [output]
    else:
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: expected a folder or a name that ends in .nii.gz or .nii")
        targets = [output / f"{case.name}.nii.gz" for case in cases]
    scans = source.parent if source.is_file() else source
    inputs = {image.resolve() for case in cases for image in case.images}
    for target in targets:
        if target.resolve() in inputs:
            raise InputError(f"{target}: is a scan to segment; choose another output")
        if target != output and target.exists() and made_by(target) is None and _same(target.parent, scans):
            raise InputError(f"{target}: lies among the scans and may be one; choose another output")
    folder = next(parent for parent in targets[0].absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{targets[0]}: cannot be written: {folder} is no folder that may be written to")
    return targets
