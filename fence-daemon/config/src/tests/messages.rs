//! Tests the texts for administrators: `messages.txt` holds a file for each kind of mistake, and
//! the exact text about it.
//!
//! To accept an intended change, run `UPDATE_MESSAGES=1 cargo test -p fence-config`, which rewrites
//! the texts, and read the difference.

use std::path::Path;

use crate::cases::{Case, PATH, cases};
use crate::{ConfigError, KeyFileError, Source, Unusable, Warnings, parse, unusable_key};

fn said_about(case: &Case) -> String {
    match parse(&Source::new(Path::new(PATH), &case.bytes()), Warnings::default()) {
        Err(error) => error.render(false),
        Ok((_, warnings)) => warnings.render(false),
    }
}

#[test]
fn every_mistake_is_shown_with_place_caret_and_remedy() {
    if std::env::var_os("UPDATE_MESSAGES").is_some() {
        let row = |case: Case| format!("=== {}\n{}--- says\n{}\n", case.title, case.text, said_about(&case));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/messages.txt");
        std::fs::write(path, cases().map(row).collect::<String>()).unwrap();
        return;
    }
    for case in cases() {
        assert_eq!(said_about(&case), case.says, "{}", case.title);
    }
}

#[test]
fn colours_only_when_asked_for() {
    let error = parse(&Source::new(Path::new("f"), b"}"), Warnings::default()).unwrap_err();
    assert!(!error.render(false).contains('\x1b'));
    assert!(error.render(true).contains('\x1b'));
}

#[test]
fn one_line_for_the_log_names_every_place() {
    let file = b"fence_virtd { listener = \"x\"; }";
    let Err(error @ ConfigError::Mistakes(_)) = parse(&Source::new(Path::new("f"), file), Warnings::default()) else {
        panic!("accepted");
    };
    assert_eq!(error.to_string(), "f:1:1: the file names no backend; f:1:26: there is no listener \"x\"");
}

#[test]
fn a_key_error_points_at_key_file_or_at_where_it_is_missing_with_the_misspelling_that_explains_it() {
    let about = |setting: &'static str, multicast: &str| {
        let file = format!("fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }}\n{multicast}");
        let source = Source::new(Path::new("f"), file.as_bytes());
        let (config, warnings) = parse(&source, Warnings::default()).unwrap();
        let files = config.multicast().unwrap().key_files();
        let path = if setting == "key_file" { files.first } else { files.second.unwrap() };
        let error = unusable_key(&source, Unusable { setting, error: KeyFileError::Empty(path) }, warnings);
        (error.to_string(), error.render(false))
    };
    let said = |multicast| about("key_file", multicast);
    let (line, shown) = said("listeners { multicast { key_file = \"/a\"; Key_File = \"/b\"; } }");
    assert_eq!(line, "f:2:53: the key file /b is empty");
    assert!(shown.contains("^^^^ empty") && shown.contains("overruled by the one on line 2"), "{shown}");
    let (line, _) = about("key_file2", "listeners { multicast { key_file = \"/a\"; key_file2 = \"/b\"; } }");
    assert_eq!(line, "f:2:54: the key file /b is empty");
    let (line, shown) = said("listeners { multicast { keyfile = \"/a\"; } }");
    assert_eq!(line, "f:2:13: the key file /etc/cluster/fence_xvm.key is empty");
    assert!(shown.contains("the default applies") && shown.contains("did you mean `key_file`?"), "{shown}");
    assert!(said("listeners { }").0.starts_with("f:2:1: ") && said("").0.starts_with("f:1:1: "));
}
