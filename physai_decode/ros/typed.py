"""The typed interfaces of physai_decode_msgs, or why they are not there."""

from typing import Any

__all__ = ['Generate', 'Token', 'unavailable']

Generate: Any = None
Token: Any = None
try:
    # The names, not the packages: Python takes the source folder of this name for a package too.
    from physai_decode_msgs.action import Generate
    from physai_decode_msgs.msg import Token
    unavailable = ''
except ImportError as error:
    unavailable = (f'physai_decode_msgs is not built ({error}): build it as the README says, by '
                   '`make msgs` or with colcon')
