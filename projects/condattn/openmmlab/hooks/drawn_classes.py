"""Give a run's visualizer names and colours of classes that it can draw."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..drawing import drawn_meta


@HOOKS.register_module()
class DrawnClassesHook(Hook):
    """Replace colours that are fewer than the classes, with which mmdet cannot draw predictions, by random ones.

    Of several data sets whose classes differ, the names and colours of the first are drawn.
    """

    def before_run(self, runner: Runner) -> None:
        """Change what the loops, which are built by now, have told the visualizer of their data sets."""
        if runner.visualizer.dataset_meta:
            runner.visualizer.dataset_meta = drawn_meta(runner.visualizer.dataset_meta)
