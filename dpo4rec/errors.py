"""The one error a user can cause, and therefore can mend."""


class InputError(ValueError):
    """Bad input, configuration or environment: names the place, the cause and the remedy.

    The command line prints it without a traceback and exits with status 2; nothing finished is lost.

    Args:
        where: file with line, table row, config key, user or item: whatever the user must look at.
        cause: what is wrong there.
        remedy: what to do about it.
    """

    def __init__(self, where: str, cause: str, remedy: str) -> None:
        self.where, self.cause, self.remedy = where, cause, remedy
        super().__init__(where, cause, remedy)  # all three, so that it survives a trip between processes

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}. {self.remedy}"
