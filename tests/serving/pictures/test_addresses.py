from ipaddress import ip_address

import pytest

from fastface_trt.serving.pictures.fetch import is_public, parse_address

PUBLIC = """
1.1.1.1 93.184.215.14 223.255.255.254 2606:4700::1111 2a00:1450:4001:81b::200e
::ffff:1.1.1.1 64:ff9b::1.1.1.1
"""
# each is in IANA's registries, or named by a cloud's own documentation
NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16
169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.8 192.0.0.9 192.0.0.192
192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1
224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:0.0.0.0
64:ff9b::7f00:1 64:ff9b::169.254.169.254 64:ff9b::10.0.0.1 64:ff9b:1::1.1.1.1
100::1 2001::1 2001:0:1::1 2001:db8::1 2002:7f00:1::1 2002:0101:0101::1 3fff::1 5f00::1
fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 2606:4700::1111%eth0 fec0::1 ff02::1
"""


@pytest.mark.parametrize("text", PUBLIC.split())
def test_public(text):
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC.split())
def test_not_public(text):
    assert not is_public(ip_address(text))


def test_text_that_is_no_address():
    assert parse_address("127.1") is None
    assert parse_address("::1") == ip_address("::1")
