//! Text of others for a terminal: names from images, what a checker prints.

/// A line without what a terminal would take for a command, and that stays one line. Tabs stay.
pub fn printable(line: &str) -> String {
    let is_command = |c: char| c.is_control() && c != '\t';
    let shown = |c: char| if is_command(c) { c.escape_default().to_string() } else { c.into() };
    line.chars().map(shown).collect()
}
