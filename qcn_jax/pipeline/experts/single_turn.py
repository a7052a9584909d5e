"""The single-turn expert: the code is in the prompt, the first answer counts; tests decide."""

from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.pipeline.experts.expert import Expert


class SingleTurn(Expert):
    """Presents tasks in the scaffold's single-turn form."""

    def present(self, scaffold: Scaffold, template: str = "") -> Scaffold:
        """See Expert.present."""
        return scaffold.single()


SINGLE_TURN = SingleTurn("single_turn", "single-turn expert", column="single-turn")
