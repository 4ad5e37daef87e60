"""Checks of an operator, for tests."""

from fastface_trt.errors import Refused


class Prompts:
    def check_prompt(self, request):
        if "forbidden" in request.prompt:
            raise Refused("Such prompts are not served.")


class Faces:
    async def check_face(self, pixels):
        raise Refused("This face is not served.")


class Results:
    def check_result(self, pixels):
        raise Refused("The picture is not handed out.")


class Nothing:
    def check_result(self, pixels):
        pass
