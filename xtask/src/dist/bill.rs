//! What the executables are made of: a list for machines (CycloneDX), and the licences' texts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::VERSION;
use crate::workspace::{self, Workspace};

/// The crates that become executables, and the kernel program, which the daemon has inside.
const ROOTS: [&str; 3] = ["fence-daemon", "fence-client", "fence-ebpf"];

/// One crate.
#[derive(Clone, Debug)]
struct Component {
    name: String,
    version: String,
    /// Its licence as an SPDX expression.
    licence: String,
    /// Its directory.
    folder: PathBuf,
    /// Whether it is of this workspace.
    is_ours: bool,
    /// The crates that it is linked with.
    needs: BTreeSet<String>,
}

impl Component {
    fn purl(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }
}

/// The crates in the executables, by cargo's names for them.
pub(super) struct Bill(BTreeMap<String, Component>);

impl Bill {
    /// Asks cargo.
    ///
    /// # Errors
    /// The lock file is not up to date, or a crate has no licence.
    pub(super) fn of(workspace: &Workspace) -> anyhow::Result<Self> {
        let mut cargo = workspace.program(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &workspace::host()?]);
        let output = cargo.output().context("cannot run cargo metadata")?;
        ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
        Self::parse(&serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?)
    }

    fn parse(metadata: &Value) -> anyhow::Result<Self> {
        let text = |value: &Value, key: &str| value[key].as_str().map(str::to_owned).unwrap_or_default();
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let linked: BTreeMap<String, BTreeSet<String>> = list(&metadata["resolve"]["nodes"])
            .iter()
            .map(|node| {
                let is_linked = |need: &&Value| list(&need["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
                let needs = list(&node["deps"]);
                (text(node, "id"), needs.iter().filter(is_linked).map(|need| text(need, "pkg")).collect())
            })
            .collect();
        let packages = list(&metadata["packages"]);
        let roots = packages.iter().filter(|package| ROOTS.contains(&text(package, "name").as_str()));
        let mut open: Vec<String> = roots.map(|package| text(package, "id")).collect();
        let mut reached = BTreeSet::new();
        while let Some(id) = open.pop() {
            if reached.insert(id.clone()) {
                open.extend(linked.get(&id).into_iter().flatten().cloned());
            }
        }
        let mut components = BTreeMap::new();
        for package in packages.iter().filter(|package| reached.contains(&text(package, "id"))) {
            let (name, licence) = (text(package, "name"), text(package, "license"));
            ensure!(!licence.is_empty(), "the crate {name} has no licence");
            let folder = Path::new(&text(package, "manifest_path")).parent().map(Path::to_owned).unwrap_or_default();
            let id = text(package, "id");
            let needs = linked.get(&id).cloned().unwrap_or_default();
            let is_ours = package["source"].is_null();
            let version = text(package, "version");
            // "MIT/Apache-2.0" is the old way to write it.
            let licence = licence.replace('/', " OR ");
            components.insert(id, Component { name, version, licence, folder, is_ours, needs });
        }
        ensure!(components.len() > ROOTS.len(), "cargo metadata names no crates");
        Ok(Self(components))
    }

    /// The list as CycloneDX 1.5 has it, without a time or a number of its own: two builds are the
    /// same.
    pub(super) fn cyclone_dx(&self, package: &str) -> String {
        let components: Vec<_> = self
            .0
            .values()
            .map(|one| {
                json!({
                    "type": "library", "bom-ref": one.purl(), "name": one.name, "version": one.version,
                    "purl": one.purl(), "licenses": [{ "expression": one.licence }],
                })
            })
            .collect();
        let dependencies: Vec<_> = self
            .0
            .values()
            .map(|one| {
                let needs: Vec<_> = one.needs.iter().filter_map(|id| self.0.get(id)).map(Component::purl).collect();
                json!({ "ref": one.purl(), "dependsOn": needs })
            })
            .collect();
        let bill = json!({
            "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
            "metadata": { "component": { "type": "application", "bom-ref": package, "name": package, "version": VERSION } },
            "components": components, "dependencies": dependencies,
        });
        format!("{bill:#}\n")
    }

    /// The licences of others' crates. A text that several crates have stands there once.
    ///
    /// # Errors
    /// A crate's directory cannot be read.
    pub(super) fn licences(&self) -> anyhow::Result<String> {
        let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut page =
            "The executables contain these libraries of others. The texts of their licences follow.\n\n".to_owned();
        for one in self.0.values().filter(|one| !one.is_ours) {
            let _ = writeln!(page, "{} {}: {}", one.name, one.version, one.licence);
            for file in fs::read_dir(&one.folder).with_context(|| format!("cannot list {}", one.folder.display()))? {
                let file = file?.path();
                let name = file.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
                let is_licence = ["LICEN", "COPY", "NOTICE", "UNLICENSE"].iter().any(|begin| name.starts_with(begin))
                    && file.is_file();
                if is_licence && let Ok(text) = fs::read_to_string(&file) {
                    texts.entry(text).or_default().push(format!("{} {}", one.name, one.version));
                }
            }
        }
        let mut texts: Vec<_> = texts.into_iter().map(|(text, of)| (of, text)).collect();
        texts.sort_unstable();
        for (mut of, text) in texts {
            of.sort_unstable();
            let _ = write!(page, "\n{}\nOf {}:\n\n{}\n", "-".repeat(72), of.join(", "), text.trim_end());
        }
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_linked_is_listed() {
        let package = |name: &str, source: Value| {
            json!({ "id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0", "source": source,
                    "manifest_path": format!("/x/{name}/Cargo.toml") })
        };
        let node = |id: &str, deps: &[(&str, Value)]| {
            let deps: Vec<_> =
                deps.iter().map(|(pkg, kind)| json!({ "pkg": pkg, "dep_kinds": [{ "kind": kind }] })).collect();
            json!({ "id": id, "deps": deps })
        };
        let metadata = json!({
            "packages": [
                package("fence-daemon", Value::Null), package("fence-client", Value::Null), package("fence-ebpf", Value::Null),
                package("linked", json!("registry")), package("deep", json!("registry")), package("tested", json!("registry")),
            ],
            "resolve": { "nodes": [
                node("fence-daemon", &[("linked", Value::Null), ("tested", json!("dev"))]),
                node("linked", &[("deep", Value::Null)]),
            ] },
        });
        let bill: Value = serde_json::from_str(&Bill::parse(&metadata).unwrap().cyclone_dx("fence-xdp")).unwrap();
        let names: Vec<_> =
            bill["components"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["deep", "fence-client", "fence-daemon", "fence-ebpf", "linked"]);
        assert_eq!(bill["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(
            bill["dependencies"][4],
            json!({ "ref": "pkg:cargo/linked@1.0.0", "dependsOn": ["pkg:cargo/deep@1.0.0"] })
        );
    }
}
