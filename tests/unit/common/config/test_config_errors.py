# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: what both daemons say to nonsense, and to what they can't have."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import parse_proxyd, parse_remoted
from common.errors import UntrustedError, UsageError
from remoted.devices.edu import Edu
from remoted.devices.pci_serial import PciSerial
from tests.support.vmconfigs import FILE, Parse, proxyd, remoted

BAD_ADDRESSES = ("5.", ".5", "5.0.0", "5.00", "005", "100", "0x5", "+5", "5_", "\u0665", "5.\u0660", "g")
BAD_PIDS = ("", "0", "01", "1x", "1_0", "\u0661", "12345678901")
BAD_WAYS = ("", "qmp", "qmp:", "pid", "soft:", "embedded ", ":soft", *(f"pid:{pid}" for pid in BAD_PIDS))


def write(directory: Path, text: str) -> Path:
    path = directory / "vm.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x7f"])
@pytest.mark.parametrize(
    "text",
    [
        'runtime-dir = "?"',
        'vm = "qmp:?"',
        'vm = "pid:1?"',
        'allow-users = ["?"]',
        '[[device]]\nid = "a"\nmodel = "?"',
        '[[device]]\nid = "a"\naddr = "?"',
        '[[device]]\nid = "a"\nsocket = "?"',
        '[[device]]\nid = "a"\nchardev = "unix:?"',
    ],
)
def test_control_characters_are_refused_everywhere(tmp_path: Path, text: str, character: str) -> None:
    escaped = f"\\u{ord(character):04x}"
    file = write(tmp_path, 'name = "vm1"\n' + text.replace("?", escaped))
    for parse in (parse_remoted, parse_proxyd):
        with pytest.raises(UsageError, match=r"has a control character$") as raised:
            parse(["--config", str(file)])
        assert str(raised.value).isprintable()


@pytest.mark.parametrize("option", ["--runtime-dir=a\nb", "--vm=qmp:a\nb", "--device=id=a,socket=a\nb"])
def test_control_characters_in_an_option_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=rf"^{option.partition('=')[0]}: '.*' has a control character$"):
        parse_proxyd(["--name", "vm1", "--runtime-dir", "/tmp", option])


def test_allow_users_of_the_file_and_of_the_command_line_which_wins(tmp_path: Path) -> None:
    file = write(tmp_path, 'name = "vm1"\nallow-users = ["nobody", "1234"]')
    argv = ["--config", str(file), "--runtime-dir", "/tmp"]
    assert parse_proxyd(argv).allow_users == (65534, 1234)
    assert parse_remoted([*argv, "--allow-user", "7", "--allow-user=root"]).allow_users == (7, 0)
    with pytest.raises(UsageError, match=r"^--allow-user: there is no user 'no such'$"):
        parse_proxyd([*argv, "--allow-user", "no such"])
    for bad, complaint in (
        ('"root"', "must be a list of strings"),
        ("[1]", "must be a string"),
        ('["no such"]', "there is no user 'no such'"),
    ):
        file = write(tmp_path, f'name = "vm1"\nallow-users = {bad}')
        with pytest.raises(UsageError, match=rf"vm.toml: allow-users: {complaint}"):
            parse_remoted(argv)


@pytest.mark.parametrize(
    ("devices", "names"),
    [
        (["edu"], ["--device 'edu'", "id is missing"]),
        (["edu,id="], ["id: ''"]),
        (["edu,id=a/b"], ["id: 'a/b'"]),
        (["edu,id=ä"], ["id: 'ä'"]),
        (["edu,id=a,\u0661b=c"], ["unknown key '\u0661b'"]),
        (["edu,id=a,1b=c"], ["unknown key '1b'"]),
        (["edu,id=a," + "b" * 65 + "=c"], ["unknown key 'bbb"]),
        (["edu,id=" + "a" * 33], ["id: 'aaa"]),
        (["edu,id=a\n"], ["'edu,id=a\\n' has a control character"]),
        (["id=a"], ["the model is missing"]),
        (["model=,id=a"], ["the model is missing"]),
        ([""], ["--device ''", "KEY=VALUE"]),
        (["edu,,id=a"], ["'edu,id'"]),
        (["edu,id=a,"], ["KEY=VALUE"]),
        (["edu,id=a,loud"], ["'loud'", "KEY=VALUE"]),
        (["edu,id=a,=b"], ["unknown key ''"]),
        (["edu,id=a,id=b"], ["id is given twice"]),
        (["edu,model=edu,id=a"], ["model is given twice"]),
        (["edu,id=a,gsi=5"], ["unknown key 'gsi'"]),
        (["edu,id=a", "edu,id=a"], ["id is given twice"]),
        (["edu,id=a,addr=20.0"], ["addr", "'20.0'", "such as 05.0"]),
        (["edu,id=a,addr=5.8"], ["addr", "'5.8'", "SLOT or SLOT.FN"]),
        (["edu,id=a,addr="], ["addr", "''"]),
        *((["edu,id=a,addr=" + addr], [f"bad address {addr!r}"]) for addr in BAD_ADDRESSES),
        (["edu,id=a,addr=5", "edu,id=b,addr=05.0"], ["--device 'edu,id=b", "addr", "05.0", "'a'"]),
        (["edu,id=a,fd=x"], ["fd", "'x'"]),
        (["edu,id=a,fd="], ["fd", "''"]),
        (["edu,id=a,fd=-1"], ["fd", "'-1'"]),
        (["edu,id=a,fd=1_0"], ["fd", "'1_0'"]),
        (["edu,id=a,fd=٣"], ["fd", "'٣'"]),
        (["edu,id=a,fd=2147483648"], ["fd", "'2147483648'"]),
        (["edu,id=a,fd=" + "9" * 5000], ["fd"]),
        (["edu,id=a,fd=3,socket=/tmp/a"], ["fd and socket"]),
        (["edu,id=a,fd=3", "edu,id=b,fd=3"], ["--device 'edu,id=b", "fd 3", "'a'"]),
        (["edu,id=a,transport=vfio"], ["transport: 'vfio'", "mpqemu or vfio-user"]),
        (["edu,id=a,transport=vfio-user,msix=no"], ["msix: 'no'", "on or off"]),
        (["edu,id=a,msix=off"], ["msix", "only with transport=vfio-user"]),
        (["edu,id=a,socket="], ["socket", "''"]),
        (["edu,id=a,socket=/x", "edu,id=b,socket=/x"], ["--device 'edu,id=b", "/x", "'a'"]),
        (["edu,id=a,socket=" + "x" * 108], ["108 bytes", "at most 107"]),
    ],
)
def test_bad_device_of_remoted(devices: list[str], names: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        remoted(*devices)
    line = str(raised.value)
    assert "\n" not in line
    assert [name for name in names if name not in line] == [], line


@pytest.mark.parametrize(
    ("device", "names"),
    [
        ("edu,id=a", ["'edu' is not KEY=VALUE (the model is for iohub-remoted)"]),
        ("bell,addr=05.0", ["'bell' is not KEY=VALUE (id=bell?)"]),
        ("id=a,fd=3", ["fd is for iohub-remoted"]),
        ("id=a,model=edu", ["model is for iohub-remoted"]),
        ("id=a,chardev=pty", ["unknown key 'chardev'", "iohub-proxyd takes id=ID"]),
        ("id=a,transport=", ["transport: ''", "mpqemu or vfio-user"]),
        ("id=a,transport=vfio-user,msix=off", ["msix is for iohub-remoted"]),
        ("id=a,gsi=4096", ["gsi", "'4096'", "4095"]),
    ],
)
def test_bad_device_of_proxyd(device: str, names: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        proxyd(device)
    assert [name for name in names if name not in str(raised.value)] == [], str(raised.value)


def test_an_id_is_suggested_only_where_it_can_be_meant() -> None:
    for device in ("addr=05.0,bell", "a b", "a b,id=a"):
        with pytest.raises(UsageError, match=r"is not KEY=VALUE$"):
            proxyd(device)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], ["--name: the VM needs a name", "--config"]),
        (["--name", ""], ["--name", "''"]),
        (["--name", "a/b"], ["--name", "'a/b'"]),
        (["--name", ".."], ["--name", "'..'"]),
        (["--name", "-a"], ["--name"]),
        (["--name", "\u0661"], ["--name", "'\u0661'"]),
        (["--name", "a" * 65], ["--name"]),
        (["--name", "vm1", "--runtime-dir", ""], ["--runtime-dir", "''"]),
        (["--name", "vm1", "--vm", "xen"], ["--vm", "'xen'", "embedded, soft"]),
        *((["--name", "vm1", "--vm", vm], ["--vm", repr(vm)]) for vm in BAD_WAYS),
        (["--name", "vm1", "--dev", "id=a"], ["--dev"]),
        (["--name", "vm1", "a\nb"], ["a\\nb"]),
        (
            ["--name", "vm1", "--config", "/nonexistent/x.toml"],
            ["--config /nonexistent/x.toml", "No such file"],
        ),
        (["--name", "vm1", "--config", "/"], ["--config /", "Is a directory"]),
        (["--name", "vm1", "--config", "/dev/zero"], ["--config /dev/zero", "larger than"]),
    ],
)
def test_bad_option(argv: list[str], names: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        parse_proxyd(argv)
    line = str(raised.value)
    assert "\n" not in line
    assert [name for name in names if name not in line] == [], line


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("name = \n", ["vm.toml: not valid TOML: ", "line 1, column 8"]),
        ('name = "vm1"\nname = "vm2"\n', ["vm.toml", "line 2"]),
        ('name = "vm1"\nnmae = "vm1"', ["vm.toml", "'nmae'"]),
        ("name = 1", ["vm.toml: name", "a string"]),
        ('name = "a b"', ["vm.toml: name", "'a b'"]),
        ('[[device]]\nid = "a"', ["--name: the VM needs a name", "or as name in ", "vm.toml"]),
        ('name = "vm1"\nvm = ["soft"]', ["vm.toml: vm", "a string"]),
        ('name = "vm1"\nvm = "xen"', ["vm.toml: vm", "'xen'"]),
        ('name = "vm1"\nruntime-dir = "\\u0000"', ["vm.toml: runtime-dir"]),
        ('name = "vm1"\ndevice = 1', ["vm.toml: device", "[[device]]"]),
        ('name = "vm1"\n[device]\nid = "a"', ["vm.toml: device", "[[device]]"]),
        ('name = "vm1"\n[[device]]\nmodel = "edu"', ["vm.toml: device 1", "id is missing"]),
        ('name = "vm1"\n[[device]]\nid = 5', ["vm.toml: device 5: id", "a string"]),
        ('name = "vm1"\n[[device]]\nid = "a"\n[[device]]\nid = "a"', ["vm.toml: device 'a'", "twice"]),
        ('name = "vm1"\n[[device]]\nid = "a"\naddr = 5', ["device 'a': addr", "a string"]),
        ('name = "vm1"\n[[device]]\nid = "a"\naddr = "x"', ["device 'a': addr", "'x'"]),
        ('name = "vm1"\n[[device]]\nid = "a"\nfd = "3"', ["device 'a': fd: must be an integer"]),
        ('name = "vm1"\n[[device]]\nid = "a"\nfd = true', ["device 'a': fd: must be an integer"]),
        ('name = "vm1"\n[[device]]\nid = "a"\nfd = -1', ["device 'a': fd", "'-1'"]),
        ('name = "vm1"\n[[device]]\nid = "a"\nchardev = 1.5', ["device 'a': chardev", "a boolean"]),
        ('name = "vm1"\n[[device]]\nid = "a"\n"b=c" = 1', ["device 'a'", "'b=c'"]),
        ('name = "vm1"\n[[device]]\nid = "a"\nsocket = "\\u0000"', ["device 'a': socket"]),
        ("a = " + "[" * 100_000, ["vm.toml"]),
        ("a = " + "9" * 10_000, ["vm.toml"]),
    ],
)
def test_bad_file(tmp_path: Path, text: str, names: list[str]) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        parse_proxyd(["--config", str(path)])
    line = str(raised.value)
    assert "\n" not in line
    assert [name for name in names if name not in line] == [], line


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.toml"
    path.write_bytes(b'\n# \xc3\xa4\nname = "\xff"')
    with pytest.raises(UsageError, match=r"/a\\nb.toml: not UTF-8: byte 0xff in line 3$"):
        parse_remoted(["--config", str(path)])


@pytest.mark.parametrize(
    ("key", "meant"),
    [("adr", "addr"), ("Addr", "addr"), ("address", "addr"), ("sokcet", "socket"), ("socket-path", "socket")],
)
def test_proxyd_does_not_take_a_misspelt_key_for_the_models_own(tmp_path: Path, key: str, meant: str) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(f'name = "vm1"\n[[device]]\nid = "com1"\nmodel = "pci-serial"\n{key} = "05.0"\n')
    with pytest.raises(UsageError, match=rf"vm.toml: device 'com1': {key}: is {meant} meant\?"):
        parse_proxyd(["--config", str(path)])
    with path.open("a") as file:
        file.write(f'{meant} = "06.0"\n')
    assert parse_proxyd(["--config", str(path)]).devices[0].properties == {key: "05.0"}


def test_proxyd_takes_the_models_options_that_come_with_iohub(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    options = "".join(
        f'{key} = "x"\n' for key in [option.name for option in (*PciSerial.OPTIONS, *Edu.OPTIONS)]
    )
    path.write_text(f'name = "vm1"\n[[device]]\nid = "a"\n{options}')
    assert len(parse_proxyd(["--config", str(path)]).devices[0].properties) == 3


@pytest.mark.parametrize("vm", ["embedded", "soft", "qmp:/x"])
def test_gsi_is_for_pid_alone(file: str, vm: str) -> None:
    with pytest.raises(
        UsageError, match=rf"vm1.toml: device 'edu0': gsi: only for --vm pid:PID, this is {vm}$"
    ):
        parse_proxyd(["--config", file, "--vm", vm])
    with pytest.raises(
        UsageError, match=rf"^--device 'id=a,gsi=5': gsi: only for --vm pid:PID, this is {vm}$"
    ):
        parse_proxyd(["--name", "vm1", "--vm", vm, "--device", "id=a,gsi=5"])
    Path(file).write_text(FILE.replace("pid:1", vm))
    assert parse_remoted(["--config", file]).devices[1].gsi == 11, "it is nothing to remoted"


def test_unplug_on_exit_is_for_qmp_alone() -> None:
    argv = ["--name", "vm1", "--unplug-on-exit"]
    assert parse_proxyd([*argv, "--vm", "qmp:/x"]).unplug_on_exit
    for vm in ("embedded", "soft", "pid:1"):
        with pytest.raises(UsageError, match=rf"^--unplug-on-exit: only for --vm qmp:SOCKET, this is {vm}$"):
            parse_proxyd([*argv, "--vm", vm])


def test_polling_is_for_a_guest_of_proxyds_own(tmp_path: Path) -> None:
    argv = ["--name", "vm1", "--poll-max-us", "20"]
    for vm in ("embedded", "soft"):
        assert parse_proxyd([*argv, "--vm", vm]).poll_max_us == 20
    for vm in ("qmp:/x", "pid:1"):
        with pytest.raises(
            UsageError, match=rf"^--poll-max-us: only for --vm embedded and soft, this is {vm}$"
        ):
            parse_proxyd([*argv, "--vm", vm])
    path = tmp_path / "vm1.toml"
    path.write_text('name = "vm1"\npoll-max-us = 20\n')
    assert parse_proxyd(["--config", str(path), "--vm", "qmp:/x"]).poll_max_us == 20, (
        "it is remoted's as well"
    )


def test_runtime_dir_is_made_or_named_with_the_reason(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        parse_remoted(["--name", "vm1", "--runtime-dir", str(path)]).make_runtime_dir()

    for _ in range(2):
        make(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"^--runtime-dir /\S+/file: /\S+/file exists and is not a directory$"
    ):
        make(tmp_path / "file")
    with pytest.raises(UsageError, match=r"^--runtime-dir /\S+/file/sub: /\S+/file exists and is not a dir"):
        make(tmp_path / "file" / "sub")
    with pytest.raises(UsageError, match=r"^--runtime-dir /proc/a: No such file or directory$"):
        make(Path("/proc/a"))


def test_directories_that_are_made_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        parse_remoted(["--name", "vm1", "--runtime-dir", str(tmp_path / "a" / "b")]).make_runtime_dir()
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o755, 0o755]


def test_runtime_dir_that_untrusted_users_can_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    config = parse_remoted(["--name", "vm1", "--runtime-dir", str(tmp_path / "open" / "run")])
    with pytest.raises(
        UntrustedError, match=r"^--runtime-dir \S+/open/run: directory \S+/open can be written by"
    ):
        config.make_runtime_dir()


@given(
    text=st.text() | st.from_regex(r"\A(edu,)?(id|addr|fd|gsi|socket|x)=[^,]{0,5}(,(addr|fd)=[^,]*){0,3}\Z")
)
def test_any_device_option_gives_a_device_or_one_line(text: str) -> None:
    for parse in (parse_remoted, parse_proxyd):
        try:
            config = parse(["--name", "vm1", "--runtime-dir", "/tmp", f"--device={text}"])
        except UsageError as error:
            assert str(error).isprintable()
        else:
            assert len(config.devices) == 1


@given(
    data=st.binary()
    | st.from_regex(
        r'\A(name = "vm"\n|vm = .{0,5}\n){1,2}\[\[device\]\]\nid = "[^"]{0,5}"\n(fd|addr|x) = .*\Z'
    ).map(str.encode)
)
def test_any_file_gives_a_vm_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    for parse in (parse_remoted, parse_proxyd):
        try:
            parse(["--config", str(path)])
        except UsageError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize(("module", "parse"), [("remoted", parse_remoted), ("proxyd", parse_proxyd)])
def test_help_has_an_example_that_works(module: str, parse: Parse) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
    )
    example = shlex.split(shown.stdout.partition("example:\n")[2].replace("\\\n", ""))
    assert example[0] == f"iohub-{module}"
    assert len(parse(example[1:]).devices) == 1


@pytest.mark.parametrize(
    "argv", [("remoted", "--help"), ("proxyd", "--help"), ("remoted", "--models")], ids=" ".join
)
def test_help_fits_80_columns(argv: tuple[str, str]) -> None:
    """Except the syntax of --device, which is one word."""
    shown = subprocess.run(
        [sys.executable, "-m", *argv], capture_output=True, text=True, check=True, env={"COLUMNS": "80"}
    )
    assert [line for line in shown.stdout.splitlines() if len(line) > 80 and "id=ID" not in line] == []


@pytest.mark.parametrize("module", ["remoted", "proxyd"])
def test_help_tells_the_exit_statuses(module: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
    )
    assert "\nexit status: 0 " in shown.stdout


@pytest.mark.parametrize(
    ("module", "program"),
    [("remoted", "iohub-remoted"), ("proxyd", "iohub-proxyd"), ("common.ctl.main", "iohubctl")],
)
def test_version(module: str, program: str) -> None:
    script = f"import sys; from {module} import main; sys.exit(main(['--version']))"
    if "." not in module:
        script = script.replace(module, f"{module}.main")
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == f"{program} {version('qemu-iohub')}\n"


@pytest.mark.parametrize("module", ["remoted", "proxyd"])
@pytest.mark.parametrize("argv", [["--bogus"], ["--name", "vm1", "--device", "id=a\x1b[2J,addr=1"]])
def test_a_daemon_answers_a_mistake_with_one_line(module: str, argv: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    [line] = run.stderr.splitlines()
    assert line.startswith(f"iohub-{module}: ")
    assert line.isprintable()
    assert run.stdout == ""
