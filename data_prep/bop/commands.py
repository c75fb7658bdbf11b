"""The commands of `python -m data_prep.bop`. A command's libraries are loaded once its arguments are understood."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from backlot.command_line import EXIT_INPUT, input_errors, parse
from data_prep.bop.settings import CheckSettings, IndexSettings, MakeScenesSettings, RenderTemplatesSettings

NUM_SHOWN = 10
"""Pictures and shards that are named when an index is made."""
DEPTH = {"divide": "divided by", "multiply": "multiplied with"}


def render_templates(argv: list[str] | None = None) -> None:
    """Render each object from all sides: the templates that a query is compared with.

        python -m data_prep.bop render_templates --models data/ycbv/models --out data/templates/ycbv
        python -m data_prep.bop render_templates --models data/gso/models_normalized --out data/templates/gso

    One file per object, <id>.safetensors, with colours, depth, poses and camera. A run that was killed goes on with the
    same command; what is there and was made in another way is refused without --overwrite.
    """
    settings = parse(
        RenderTemplatesSettings, argv, "python -m data_prep.bop render_templates", render_templates.__doc__
    )

    from data_prep.bop.models import read_models
    from data_prep.bop.render_templates import render_all

    with input_errors():
        models = read_models(settings.models, settings.unit, settings.objects)
        count = render_all(
            models,
            settings.out,
            views=settings.views,
            size=settings.size,
            backend=settings.backend,
            supersample=settings.supersample,
            num_workers=settings.num_workers,
            overwrite=settings.overwrite,
        )
    print(f"{settings.out}: templates of {len(models)} objects, {count} of them rendered now")


def index(argv: list[str] | None = None) -> None:
    """Find what lies where in tar shards or BOP scenes, so that millions of samples open in a second.

        python -m data_prep.bop index data/gso/train_pbr_web --models data/gso/models_normalized
        python -m data_prep.bop index data/ycbv                       # every split below it

    The index lies beside the shards or scenes, as .poses.index. Shards that are damaged are named: training takes their
    numbers in `skip_shards`. Pictures that cannot be used are named and left out.
    """
    settings = parse(IndexSettings, argv, "python -m data_prep.bop index", index.__doc__)

    from data_prep.bop.index import build_index, find_folders

    with input_errors():
        for folder in find_folders(settings.folder):
            report = build_index(folder, settings.models, settings.unit, settings.depth)
            problems = {**{f"{name} is damaged": reason for name, reason in report.problems.items()}, **report.bad}
            for name, reason in list(problems.items())[:NUM_SHOWN]:
                print(f"{name}: {reason}")
            if len(problems) > NUM_SHOWN:
                print(f"... and {len(problems) - NUM_SHOWN} more")
            print(
                f"{folder}: {report.num_pictures} pictures, {report.num_rows} poses of {report.num_objects} objects,"
                f" {len(report.bad)} pictures left out, {len(report.problems)} shards damaged;"
                f" numbers of depth are {DEPTH[report.depth]} depth_scale"
            )


def check(argv: list[str] | None = None) -> None:
    """Read every sample of tar shards or BOP scenes and name each bad one; or say what is wrong with a csv of results.

        python -m data_prep.bop check data/ycbv/train_pbr --num_samples 1000
        python -m data_prep.bop check vpog_ycbv-test.csv --dataset data/ycbv

    The exit code is 2 if there is a bad sample, or anything wrong.
    """
    settings = parse(CheckSettings, argv, "python -m data_prep.bop check", check.__doc__)
    is_good = check_csv(settings) if settings.path.suffix == ".csv" else check_samples(settings)
    if not is_good:
        raise SystemExit(EXIT_INPUT)


def check_csv(settings: CheckSettings) -> bool:
    """Whether a csv file can be handed in; prints a line for each thing that is wrong."""
    from data_prep.bop.format import TARGETS, TARGETS_NAME
    from data_prep.bop.json_files import read_json
    from data_prep.bop.results import check_results

    with input_errors():
        targets = None if settings.dataset is None else read_json(settings.dataset / TARGETS_NAME, TARGETS)
        problems = check_results(settings.path, targets)
    for problem in problems:
        print(problem)
    print(f"{settings.path}: {len(problems)} problems")
    return not problems


def check_samples(settings: CheckSettings) -> bool:
    """Whether all samples of a folder can be used, and the meshes of their objects; prints a line for each bad one."""
    from backlot.fingerprint import spread
    from data_prep.bop.index import PoseSource, find_folders

    with input_errors():
        folders = find_folders(settings.path)
        sources = [PoseSource(folder, settings.min_visib, settings.skip_shards) for folder in folders]
    bad = count = 0
    for source in sources:
        rows = spread(len(source), settings.num_samples or len(source))
        count += len(rows)
        bad += name_bad(source.models[object_id].load_mesh for object_id in source.objects)
        bad += name_bad(partial(source.read, row) for row in rows)
    objects = {object_id for source in sources for object_id in source.objects}
    print(f"samples: {count}, objects: {len(objects)}, bad: {bad}")
    return not bad


def name_bad(reads: Iterable[Callable[[], object]]) -> int:
    """Print a line for each that fails, and count them."""
    bad = 0
    for read in reads:
        try:
            read()
        except ValueError as error:
            bad += 1
            print(error)
    return bad


def make_scenes(argv: list[str] | None = None) -> None:
    """Make objects, and pictures of several of them with light, shadow and occlusion, as a BOP dataset.

        python -m data_prep.bop make_scenes --out data/made --num_objects 50 --num_images 2000 --image_size 640 480
        python -m data_prep.bop make_scenes --out data/made_test --split test --seed 1     # objects never seen before

    Models, scenes, masks, cameras and test_targets_bop19.json are written, and the index. A run that was killed goes on
    with the same command.
    """
    settings = parse(MakeScenesSettings, argv, "python -m data_prep.bop make_scenes", make_scenes.__doc__)

    from data_prep.bop.format import BopDataset
    from data_prep.bop.index import build_index
    from data_prep.bop.query_scenes import make_dataset
    from data_prep.bop.shards import write_shards

    with input_errors():
        make_dataset(
            settings.out,
            settings.seed,
            settings.num_objects,
            settings.num_images,
            settings.image_size,
            split=settings.split,
            num_symmetric=settings.num_symmetric,
            num_workers=settings.num_workers,
        )
        folders = [settings.out / settings.split]
        if settings.shards:
            folders.append(settings.out / f"{settings.split}_web")
            write_shards(BopDataset(settings.out, settings.split), folders[-1])
        reports = [build_index(folder) for folder in folders]
    print(f"{settings.out}: {reports[0].num_pictures} pictures, {reports[0].num_rows} poses")
