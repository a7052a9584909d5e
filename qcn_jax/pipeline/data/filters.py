"""Which texts mid-training leaves out, and why; what the reasons are is counted (texts.Findings)."""

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator

from qcn_jax.config import FilterConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.texts import Findings, Text

_HEAD = 1000  # characters in which a generated file says so
_GENERATED = re.compile(r"@generated|\bauto-?generated\b|\bgenerated (?:by|from|with)\b|\bdo not edit\b", re.IGNORECASE)
_SIGNIFICANT = 24  # characters from which a line says where it comes from
_COPY_SHARE = 0.3  # of a text's significant lines that a held-out repository also has
_SHINGLE = 5  # words that follow one another; near duplicates share most of these
_PERMUTATIONS = 128  # of MinHash: an error of about 0.09 in the similarity
# Keys and tokens that have a form of their own; words beside "password =" and random-looking strings are everywhere.
_SECRETS = (
    "ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "DiscordBotTokenDetector",
    "GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector", "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector", "SquareOAuthDetector",
    "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector")
_LIBRARIES = {"secrets": ("detect_secrets", "detect-secrets"), "near_duplicates": ("datasketch", "datasketch")}


def check(config: FilterConfig, field: str) -> None:
    """Raises UserError, before any work, where a filter's library is not installed; the line names the filter."""
    for name, (module, package) in _LIBRARIES.items():
        if getattr(config, name) and importlib.util.find_spec(module) is None:
            raise UserError(f"{field}.{name}: needs {package}; pip install 'qcn_jax[data]'")


def filtered(texts: Iterable[Text], config: FilterConfig, heldout: Iterable[str], findings: Findings) -> Iterator[Text]:
    """Yields the texts that every filter lets through, and counts the others by reason.

    Args:
      texts: in order; of near duplicates the first stays.
      config: which filters there are.
      heldout: texts whose copies are left out, whatever `config` says: their lines are held in memory.
      findings: gets the counts.
    """
    rules = list(_rules(config, heldout))
    for text in texts:
        reason = next((reason for reason, refuses in rules if refuses(text)), None)
        if reason is None:
            findings.kept += 1
            yield text
        else:
            findings.without(reason)


def _rules(config: FilterConfig, heldout: Iterable[str]) -> Iterator[tuple[str, Callable[[Text], bool]]]:
    """(reason, whether a text is refused for it), the cheapest first and what remembers texts last."""
    if config.min_characters:
        yield f"under {config.min_characters} characters", lambda text: len(text.text) < config.min_characters
    if config.max_characters:
        yield f"over {config.max_characters} characters", lambda text: len(text.text) > config.max_characters
    if config.licences:
        allowed = {name.lower() for name in config.licences}
        yield "licence", lambda text: not _licences(text) or not _licences(text) <= allowed
    if config.max_line:
        yield (f"lines over {config.max_line} characters",
               lambda text: max(map(len, text.text.splitlines()), default=0) > config.max_line)
    if config.generated:
        yield "generated", lambda text: _GENERATED.search(text.text, 0, _HEAD) is not None
    known = {line for text in heldout for line in significant_lines(text)}
    if known:
        yield "copies of held-out code", lambda text: is_copy(text.text, known)
    if config.secrets:
        yield "secrets", has_secret
    if config.near_duplicates:
        yield "near duplicates", _seen_before(config.near_duplicates)


def significant_lines(text: str) -> list[str]:
    """Lines long enough to say where they come from, without their indentation."""
    return [line for raw in text.splitlines() if len(line := raw.strip()) >= _SIGNIFICANT]


def is_copy(text: str, known: set[str]) -> bool:
    """Whether more than a small part of the telling lines of `text` are among `known`."""
    lines = significant_lines(text)
    return sum(line in known for line in lines) > _COPY_SHARE * len(lines)


def _licences(text: Text) -> set[str]:
    return {name.strip().lower() for name in text.licence.split(",") if name.strip()}


def has_secret(text: Text) -> bool:
    """Whether a line holds what detect-secrets takes for a key or a token of a known form."""
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    with transient_settings({"plugins_used": [{"name": name} for name in _SECRETS]}):
        return any(True for line in text.text.splitlines() for _ in scan_line(line))


def _seen_before(similarity: float) -> Callable[[Text], bool]:
    """Tells of a text whether an earlier one shares so many of its shingles; about 3 kB are held of each that stays."""
    from datasketch import MinHash, MinHashLSH

    index, count = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS), 0

    def seen(text: Text) -> bool:
        nonlocal count
        words = re.findall(r"\w+", text.text)
        shingles = {" ".join(words[i:i + _SHINGLE]).encode("utf-8", "replace")
                    for i in range(max(1, len(words) - _SHINGLE + 1))}
        sketch = MinHash(_PERMUTATIONS)
        sketch.update_batch(list(shingles))
        if index.query(sketch):
            return True
        index.insert(count, sketch, check_duplication=False)
        count += 1
        return False

    return seen
