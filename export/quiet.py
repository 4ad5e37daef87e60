"""What the libraries print while they load, kept off the terminal of a command."""


def quiet_libraries() -> None:
    """Switch off progress bars and notices of diffusers, transformers and the hub client's loader.

    For commands only: it changes the libraries' own settings for the whole process.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
