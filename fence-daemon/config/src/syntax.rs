//! The texts about a file's grammar: labels and remedies.

use super::raw::{MAX_DEPTH, SyntaxKind};

/// The text beside the caret.
pub(super) fn syntax_label(kind: &SyntaxKind) -> &'static str {
    match kind {
        SyntaxKind::Empty => "nothing here",
        SyntaxKind::Unexpected(_) => "unexpected",
        SyntaxKind::LoneName(_) => "expected `=` or `{` after this",
        SyntaxKind::MissingValue(_) => "expected a value after `=`",
        SyntaxKind::Unquoted(_) => "not in quotes",
        SyntaxKind::EmptyValue(_) => "empty",
        SyntaxKind::Unterminated(_) => "opened here",
        SyntaxKind::MissingSemicolon(_) => "expected `;`",
        SyntaxKind::SuperfluousSemicolon | SyntaxKind::SuperfluousBrace => "superfluous",
        SyntaxKind::Unclosed(_) => "opened here, and the file ends without its `}`",
        SyntaxKind::TooDeep => "nested too deep",
        SyntaxKind::NotUtf8 => "not UTF-8",
        SyntaxKind::ControlCharacter => "not printable",
    }
}

/// The remedy.
pub(super) fn syntax_help(kind: &SyntaxKind) -> String {
    match kind {
        SyntaxKind::Empty => {
            "write at least `fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }`".to_owned()
        }
        SyntaxKind::Unexpected(_) => {
            "write `key = \"value\";` or `section { ... }`; comments begin with `#`".to_owned()
        }
        SyntaxKind::LoneName(name) => format!("write `{name} = \"value\";` or `{name} {{ ... }}`"),
        SyntaxKind::MissingValue(name) | SyntaxKind::Unquoted(name) => format!("write `{name} = \"value\";`"),
        SyntaxKind::EmptyValue(name) => format!("write `{name} = \"value\";`, or remove it"),
        SyntaxKind::Unterminated(name) => format!("write `{name} = \"value\";` on one line"),
        SyntaxKind::MissingSemicolon(_) => "end each value with `;` (a value cannot contain a quote)".to_owned(),
        SyntaxKind::SuperfluousSemicolon => "remove it: only values end with `;`, sections don't".to_owned(),
        SyntaxKind::SuperfluousBrace => "remove it, or add the missing `{` above".to_owned(),
        SyntaxKind::Unclosed(_) => "close it with `}`; the missing brace may also be further inside".to_owned(),
        SyntaxKind::TooDeep => format!("a configuration needs three levels; {MAX_DEPTH} are allowed"),
        SyntaxKind::ControlCharacter => "remove it".to_owned(),
        SyntaxKind::NotUtf8 => "save the file as UTF-8".to_owned(),
    }
}
