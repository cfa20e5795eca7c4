//! `fence-manual DIRECTORY DATE` writes the manual pages and completions there. `cargo xtask dist`
//! puts them into the packages.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(directory), Some(date)) = (arguments.next(), arguments.next()) else {
        bail!("usage: fence-manual DIRECTORY DATE");
    };
    for file in fence_manual::files(&date)? {
        let path = Path::new(&directory).join(&file.path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        std::fs::write(&path, &file.content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
