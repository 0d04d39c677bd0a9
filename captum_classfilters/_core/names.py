"""What things are called: short names beside pictures, values in messages, the nearest names to a
misspelt one."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from captum_classfilters._core.types import ClassNames

LONGEST_NAME = 25
_MOST_SHOWN = 8

# "n02123045 tiger cat", "n02123045_tiger_cat", "n02085620-Chihuahua": data sets' folders.
_WORDNET_ID = re.compile(r"^[nv]\d{8}[\s_:,.-]+(?=\S)")


def short_name(name: object, length: int = LONGEST_NAME, *, synonyms: bool = True) -> str:
    """A name that fits beside a picture: of so many characters, without a WordNet number if there is a
    name behind it; a class's, up to its first comma, which synonyms follow.

    Examples::

        >>> from captum_classfilters._core.names import short_name
        >>> short_name("n02123159 tiger cat, Felis tigris")
        'tiger cat'
        >>> short_name("common iguana of the tropical rain forest")
        'common iguana of the…'
    """
    text = _WORDNET_ID.sub("", " ".join(str(name).split()))
    first = " ".join(text.split(",")[0].split()) if synonyms else ""
    text = first or text
    if len(text) > length:
        cut = text[: length - 1]
        words = cut.rpartition(" ")[0]  # whole words, where they are most of it
        text = f"{words if len(words) > length // 2 else cut.rstrip()}…"
    return text


def kind_of(value: object) -> str:
    """What a value is, as messages say it.

    Examples::

        >>> from captum_classfilters._core.names import kind_of
        >>> kind_of(3), kind_of("3")
        ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def plural(number: int, one: str) -> str:
    """The noun of one thing as it is of so many."""
    return one if number == 1 else one + ("es" if one.endswith("s") else "s")


def counted(number: int, one: str) -> str:
    """So many of a thing, in words.

    Examples::

        >>> from captum_classfilters._core.names import counted
        >>> counted(1, "output"), counted(1200, "class")
        ('1 output', '1,200 classes')
    """
    return f"{number:,} {plural(number, one)}"


def listed_names(
    class_names: ClassNames | None, num_classes: int | None = None
) -> list[str] | None:
    """Class names that the user gave, as a list in the classes' order; read once.

    Raises:
        ValueError: They have no such order, or are not as many as there are classes.

    Examples::

        >>> from captum_classfilters._core.names import listed_names
        >>> listed_names({1: "dog", 0: "cat"})
        ['cat', 'dog']
    """
    if class_names is None:
        return None
    if isinstance(class_names, str):
        raise ValueError(f"class_names={class_names!r} is one name; expected a sequence of names.")
    if isinstance(class_names, (set, frozenset)) or not isinstance(class_names, Iterable):
        raise ValueError(
            f"class_names is {kind_of(class_names)}; expected a sequence of names in the classes' order."
        )
    if isinstance(class_names, Mapping):
        by_index = {int(k) if str(k).isdecimal() else k: name for k, name in class_names.items()}
        if {*by_index} != {*range(len(class_names))}:
            raise ValueError(
                f"class_names has the keys {shortened(list(class_names))}; expected 0 to "
                f"{len(class_names) - 1}, as in a Hugging Face model's config.id2label."
            )
        class_names = [by_index[index] for index in range(len(by_index))]
    names = [str(name) for name in class_names]
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f"class_names has {len(names)} names; expected {num_classes}, one for each class."
        )
    return names


def names_that_cover(class_names: ClassNames | None, classes: Iterable[int]) -> list[str] | None:
    """Class names that the user gave, where only some classes are known, not how many there are.

    Raises:
        ValueError: As for :func:`listed_names`, or one of the classes has no name.
    """
    names = listed_names(class_names)
    nameless = [] if names is None else [class_ for class_ in classes if class_ >= len(names)]
    if names is not None and nameless:
        raise ValueError(
            f"class_names has {len(names)} names, none for class {min(nameless)}; expected one for "
            "each class."
        )
    return names


def check_list(name: str, value: object) -> None:
    """Raise if an argument that takes several numbers or names is a single one."""
    single = getattr(value, "shape", None) == ()
    if isinstance(value, str) or single or not isinstance(value, Iterable):
        one = "name" if isinstance(value, str) else "number"
        raise ValueError(f"{name}={shortened(value)} is one {one}; expected a list of them.")


def shortened(value: object, most: int = 80) -> str:
    """A value as messages show it, cut where it is longer.

    Examples::

        >>> from captum_classfilters._core.names import shortened
        >>> shortened("abcdefgh", 8), shortened("abc", 8)
        ("'abcd...", "'abc'")
    """
    try:
        text = repr(value)
    except RecursionError:
        text = "nested too deeply"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def close_names(name: str, names: Sequence[str], most: int = 3) -> list[str]:
    """The names that a misspelt one may mean, nearest first.

    Case, underscores and hyphens do not count, and a name of several synonyms is met by each:
    ``"Tiger_cat"`` and ``"felis tigris"`` are near ``"tiger cat, Felis tigris"``.
    """
    plain = _plain(name)
    by_form: dict[str, list[str]] = {}
    for full in dict.fromkeys(map(str, names)):
        bare = _WORDNET_ID.sub("", full)
        for form in {full, bare, *bare.split(",")}:
            if plain_form := _plain(form):
                by_form.setdefault(plain_form, []).append(full)
    forms = difflib.get_close_matches(plain, by_form, n=4 * most, cutoff=0.5) if plain else []
    within = [form for form in by_form if len(plain) > 2 and plain in form.split()]
    near = dict.fromkeys(full for form in [*forms, *within] for full in by_form[form])
    return list(near)[:most]


def hint(name: object, names: Sequence[str], what: str = "names") -> str:
    """What to say of a name that is not there: "Did you mean ...?", or which names there are, as for
    what is no name at all, a number in its place for example."""
    near = close_names(name, names) if isinstance(name, str) else []
    if near:
        return f"Did you mean {', '.join(map(repr, near))}?"
    if not len(names):
        return f"There are no {what}."
    more = ", ..." if len(names) > _MOST_SHOWN else ""
    return f"The {what} are {', '.join(map(repr, names[:_MOST_SHOWN]))}{more}."


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[_\-]+", " ", text).casefold().split())
