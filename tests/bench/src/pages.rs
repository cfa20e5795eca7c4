//! The pages in `docs/measured`. A page is a template in `pages/`, in which the writers put figures
//! and tables in the place of each `{name}`.

use crate::machine::Fact;

/// A page of its template. A value that is a table ends with the end of its last line.
#[must_use]
pub fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let filled = |text: String, (name, value): &(&str, &str)| text.replace(&format!("{{{name}}}"), value);
    values.iter().fold(template.to_owned(), filled)
}

/// The machine as a table, but for what is not about it.
#[must_use]
pub fn machine(facts: &[Fact], but: &[&str]) -> String {
    let told = facts.iter().filter(|fact| !but.contains(&fact.what));
    let rows = told.map(|fact| format!("| {} | {} |\n", fact.what, fact.is));
    std::iter::once("| | |\n|---|---|\n".to_owned()).chain(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_fields_of_a_template_are_filled() {
        let template = "a {one}, {two}\n{three}b\n";
        assert_eq!(fill(template, &[("two", "2"), ("one", "1")]), "a 1, 2\n{three}b\n");
        let facts = [("cores", "2"), ("QEMU", "7")].map(|(what, is)| Fact { what, is: is.to_owned() });
        assert_eq!(machine(&facts, &["QEMU"]), "| | |\n|---|---|\n| cores | 2 |\n");
    }

    /// Panics where the page in `docs/measured` does not have the words of its template.
    fn is_on_the_page(template: &str, page: &str) {
        let path = fence_lab::tools::workspace().join("docs/measured").join(page);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut rest = text.as_str();
        // Each piece but the first begins with the name of its place.
        for piece in template.split('{').map(|piece| piece.split_once('}').map_or(piece, |(_, piece)| piece).trim()) {
            let found = rest.find(piece).unwrap_or_else(|| panic!("{page} does not have the words:\n{piece}"));
            rest = &rest[found + piece.len()..];
        }
    }

    /// A change of the words changes template and page together: the figures stay as measured.
    #[test]
    fn pages_have_the_words_of_their_templates() {
        is_on_the_page(crate::report::PAGE, "benchmarks.md");
        is_on_the_page(crate::bystanders::PAGE, "bystanders.md");
        is_on_the_page(crate::clusters::report::PAGE, "clusters.md");
        is_on_the_page(crate::clusters::report::RACES, "clusters.md");
        is_on_the_page(crate::rate_limit::report::PAGE, "rate-limit.md");
        is_on_the_page(crate::soak::report::PAGE, "soak.md");
    }
}
