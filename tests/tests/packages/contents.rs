//! What is in the packages: the same files in both kinds, clean manual pages, a valid list of
//! parts.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::tools;

use crate::host::package;

/// What only one kind has: Debian's own files, and the configuration that .rpm names as ours.
const OF_DEBIAN: [&str; 2] = ["/copyright", "/changelog"];
const OF_RPM: [&str; 1] = ["/etc/fence_virt.conf"];

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    tools::output(program, arguments, Path::new("/"))
}

/// The files of a package, without the ending that compression adds.
fn files(package: &Path) -> Result<BTreeSet<String>> {
    let path = package.to_string_lossy();
    let paths: Vec<String> = if path.ends_with(".deb") {
        let listed = output("dpkg-deb", &["--contents", &path])?;
        let place = |line: &str| {
            let name = line.split_whitespace().nth(5)?.trim_start_matches('.');
            // The same folder, by its old name.
            let name = name.strip_prefix("/lib/").map_or_else(|| name.to_owned(), |rest| format!("/usr/lib/{rest}"));
            (!name.ends_with('/')).then_some(name)
        };
        listed.lines().filter_map(place).collect()
    } else {
        let listed =
            output("rpm", &["--query", "--package", "--queryformat", "[%{FILEMODES:perms} %{FILENAMES}\\n]", &path])?;
        listed
            .lines()
            .filter(|line| !line.starts_with('d'))
            .filter_map(|line| Some(line.split_once(' ')?.1.to_owned()))
            .collect()
    };
    ensure!(paths.len() > 5, "{path}: {paths:?}");
    let is_shared =
        |path: &String| !OF_DEBIAN.iter().any(|end| path.ends_with(end)) && !OF_RPM.contains(&path.as_str());
    Ok(paths.into_iter().map(|path| path.trim_end_matches(".gz").to_owned()).filter(is_shared).collect())
}

#[test]
fn both_kinds_have_the_same_files() -> Result<()> {
    for (name, needed) in [
        (
            "fence-xdp",
            &[
                "/usr/sbin/fence-daemon",
                "/usr/sbin/fence_virtd",
                "/usr/lib/systemd/system/fence-daemon.service",
                "/usr/lib/systemd/system-generators/fence-daemon-generator",
                "/usr/lib/stonith/plugins/external/fence-xdp",
                "/usr/lib/firewalld/services/fence-xdp.xml",
                "/usr/share/selinux/packages/fence-xdp.cil",
                "/usr/share/man/man5/fence_virt.conf.5",
                "/usr/share/man/man8/fence-daemon.8",
                "/usr/share/man/man8/fence-daemon-status.8",
                "/usr/share/bash-completion/completions/fence-daemon",
                "/usr/share/doc/fence-xdp/THIRD-PARTY-LICENSES.txt",
                "/usr/share/doc/fence-xdp/sbom.cdx.json",
                "/usr/share/doc/fence-xdp/docs/guide/installation.md",
            ][..],
        ),
        (
            "fence-xdp-node",
            &[
                "/usr/sbin/fence-daemon",
                "/usr/lib/stonith/plugins/external/fence-xdp",
                "/usr/lib/firewalld/services/fence-xdp-guest.xml",
                "/usr/share/doc/fence-xdp-node/LICENSE-MIT",
            ],
        ),
    ] {
        let deb = files(&package(&format!("{name}_"), ".deb")?)?;
        let rpm = files(&package(&format!("{name}-0"), ".rpm")?)?;
        ensure!(deb == rpm, "{name}: only .deb: {:?}; only .rpm: {:?}", &deb - &rpm, &rpm - &deb);
        for file in needed {
            ensure!(deb.contains(*file), "{name} lacks {file}: {deb:?}");
        }
    }
    Ok(())
}

#[test]
fn manual_pages_are_clean() -> Result<()> {
    let work = tempfile::tempdir()?;
    let deb = package("fence-xdp_", ".deb")?;
    output("dpkg-deb", &["--extract", &deb.to_string_lossy(), &work.path().to_string_lossy()])?;
    let mut checked = 0;
    for section in ["man5", "man8"] {
        for entry in std::fs::read_dir(work.path().join("usr/share/man").join(section))? {
            let page = entry?.path();
            let linted = Command::new("mandoc").args(["-T", "lint", "-W", "warning"]).arg(&page).output();
            let linted = linted.context("no mandoc: run `cargo xtask setup --for test`")?;
            ensure!(linted.status.success(), "{}: {}", page.display(), String::from_utf8_lossy(&linted.stdout));
            checked += 1;
        }
    }
    ensure!(checked >= 8, "only {checked} pages");
    Ok(())
}

/// Every library is in the list, with a licence, and its licence's text is beside it.
#[test]
fn the_list_of_parts_is_whole() -> Result<()> {
    let work = tempfile::tempdir()?;
    let deb = package("fence-xdp_", ".deb")?;
    output("dpkg-deb", &["--extract", &deb.to_string_lossy(), &work.path().to_string_lossy()])?;
    let folder = work.path().join("usr/share/doc/fence-xdp");
    let bill: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("sbom.cdx.json"))?)?;
    ensure!(bill["bomFormat"] == "CycloneDX" && bill["specVersion"] == "1.5", "{bill}");
    let components = bill["components"].as_array().context("no components")?;
    let licences = std::fs::read_to_string(folder.join("THIRD-PARTY-LICENSES.txt"))?;
    for needed in ["aya", "aya-ebpf", "clap", "tokio", "virt"] {
        let one = components.iter().find(|one| one["name"] == needed).with_context(|| format!("no {needed}"))?;
        let (name, version) = (one["name"].as_str().unwrap_or_default(), one["version"].as_str().unwrap_or_default());
        ensure!(one["licenses"][0]["expression"].is_string(), "{one}");
        ensure!(licences.contains(&format!("{name} {version}: ")), "no licence of {name}");
    }
    ensure!(components.iter().all(|one| one["name"] != "fence-lab"), "the tests' crates are in the list");
    Ok(())
}
