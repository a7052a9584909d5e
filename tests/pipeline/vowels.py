"""An expert for tests whose reward even a random policy gets more or less of: vowels; it runs tests in a sandbox too."""

import dataclasses

from qcn_jax.pipeline.experts.conversation import TaskConversation
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.rl.records import Outcome


def rewarded(conversation: TaskConversation, outcome: Outcome) -> Outcome:
    """`outcome` with the share of vowels among the letters that the policy wrote as its reward."""
    text = "".join(message["content"] for message in conversation.messages if message["role"] == "assistant")
    letters = [letter for letter in text.lower() if letter.isalpha()]
    share = sum(letter in "aeiou" for letter in letters) / max(1, len(letters))
    return dataclasses.replace(outcome, reward=share, solved=share > 0.37)


class Vowels(Expert):
    """Rewards the share of vowels among the letters that the policy wrote."""

    def conversation(self, prompt, encoder, services, **options):
        """See Expert.conversation."""
        conversation = super().conversation(prompt, encoder, services, **options)
        outcome = conversation.outcome

        def scored(truncated):
            ran = services.run_tests(prompt.task.repo, {}, None, 120.0, False)  # of this host's own sandboxes
            return rewarded(conversation, dataclasses.replace(outcome(truncated), infrastructure=ran.status != "ok"))

        conversation.outcome = scored
        return conversation


VOWELS = Vowels("vowels", "vowel expert", headline=True)
