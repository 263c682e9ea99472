"""The Python client of Flamboyance, the few-shot inference server for Flamingo-family vision-language models.

with Client() as client:
    prompt = [*shot("cat.jpg", "This is a cat."), image("dog.jpg"), "This is a"]
    print(client.complete(prompt, max_tokens=5).text)

The package itself imports next to nothing, so that its command catches an interrupt of the imports too.
"""

import importlib

# not that of typing, whose import would take longer than all others here; type checkers know the name
TYPE_CHECKING = False

if TYPE_CHECKING:
    from flamboyance_client.exports import *  # noqa: F403 - all names, for type checkers
    from flamboyance_client.exports import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """Return a module of the package or a public name, the first of which imports all of them."""
        module = f"{__name__}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.exports"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
