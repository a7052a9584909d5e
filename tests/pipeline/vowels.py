"""An expert for tests whose reward even a random policy gets more or less of: vowels; it runs tests in a sandbox too."""

import dataclasses

from qcn_jax.pipeline.experts.expert import Expert


class Vowels(Expert):
    """Rewards the share of vowels among the letters that the policy wrote."""

    def conversation(self, prompt, encoder, services, **options):
        """See Expert.conversation."""
        conversation = super().conversation(prompt, encoder, services, **options)
        outcome = conversation.outcome

        def scored(truncated):
            ran = services.run_tests(prompt.task.repo, {}, None, 120.0, False)  # of this host's own sandboxes
            text = "".join(message["content"] for message in conversation.messages if message["role"] == "assistant")
            letters = [letter for letter in text.lower() if letter.isalpha()]
            share = sum(letter in "aeiou" for letter in letters) / max(1, len(letters))
            return dataclasses.replace(outcome(truncated), reward=share, solved=share > 0.37,
                                       infrastructure=ran.status != "ok")

        conversation.outcome = scored
        return conversation


VOWELS = Vowels("vowels", "vowel expert", headline=True)
