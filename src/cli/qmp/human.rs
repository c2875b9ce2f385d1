//! Answers for people: lists of like things as tables, everything else as `name: value`, indented.

use serde_json::{Map, Value};

/// The text of an answer; empty for an empty one.
pub fn text(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(object) => put_object(&mut text, object, 0),
        Value::Array(values) => put_array(&mut text, values, 0),
        Value::Null => {}
        scalar => text = shown(scalar) + "\n",
    }
    text
}

/// A value on one line. Control characters in names do not reach the terminal.
pub fn shown(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_string(),
        Value::Bool(true) => "yes".to_string(),
        Value::Bool(false) => "no".to_string(),
        other => other.to_string(),
    };
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn is_scalar(value: &Value) -> bool {
    !matches!(value, Value::Object(_) | Value::Array(_))
}

fn put_object(text: &mut String, object: &Map<String, Value>, indent: usize) {
    for (name, value) in object {
        text.push_str(&format!("{:indent$}{name}:", ""));
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                text.push('\n');
                put_object(text, inner, indent + 2);
            }
            Value::Array(inner) if inner.iter().all(is_scalar) => {
                let line: Vec<_> = inner.iter().map(shown).collect();
                text.push_str(&format!(" {}\n", line.join(", ")));
            }
            Value::Array(inner) => {
                text.push('\n');
                put_array(text, inner, indent + 2);
            }
            Value::Object(_) => text.push_str(" -\n"),
            scalar => text.push_str(&format!(" {}\n", shown(scalar))),
        }
    }
}

fn put_array(text: &mut String, values: &[Value], indent: usize) {
    if let Some(rows) = as_rows(values) {
        return put_table(text, &rows, indent);
    }
    for (index, value) in values.iter().enumerate() {
        match value {
            Value::Object(object) => {
                if index > 0 {
                    text.push('\n');
                }
                put_object(text, object, indent);
            }
            Value::Array(inner) => put_array(text, inner, indent + 2),
            scalar => text.push_str(&format!("{:indent$}{}\n", "", shown(scalar))),
        }
    }
}

/// The elements, if they are objects without depth, two or more names wide.
fn as_rows(values: &[Value]) -> Option<Vec<&Map<String, Value>>> {
    let row = |value: &'_ Value| match value {
        Value::Object(object) => object.values().all(is_scalar),
        _ => false,
    };
    if values.is_empty() || !values.iter().all(row) {
        return None;
    }
    Some(values.iter().filter_map(Value::as_object).collect())
}

fn put_table(text: &mut String, rows: &[&Map<String, Value>], indent: usize) {
    let mut columns: Vec<&String> = Vec::new();
    for name in rows.iter().flat_map(|row| row.keys()) {
        if !columns.contains(&name) {
            columns.push(name);
        }
    }
    let is_number =
        |name: &String| rows.iter().all(|row| row.get(name).is_none_or(Value::is_number));
    let cell = |row: &Map<String, Value>, name: &String| row.get(name).map_or("-".into(), shown);
    let cells = |row: &&Map<String, Value>| columns.iter().map(|name| cell(row, name)).collect();
    let titles: Vec<_> = columns.iter().map(|name| (name.as_str(), is_number(name))).collect();
    let table = table(&titles, &rows.iter().map(cells).collect::<Vec<_>>());
    // One column needs no title.
    for line in table.lines().skip(usize::from(titles.len() == 1)) {
        text.push_str(&format!("{:indent$}{line}\n", ""));
    }
}

/// A table. Each column has a title, and whether it goes to the right, as numbers do.
pub fn table(columns: &[(&str, bool)], rows: &[Vec<String>]) -> String {
    let width = |(at, (title, _)): (usize, &(&str, bool))| {
        let cells = rows.iter().map(|row| row[at].chars().count());
        cells.chain([title.chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<_> = columns.iter().enumerate().map(width).collect();
    let titles: Vec<_> = columns.iter().map(|(title, _)| title.to_string()).collect();
    let mut text = String::new();
    for row in [&titles].into_iter().chain(rows) {
        let mut line = String::new();
        for ((cell, width), (_, to_the_right)) in row.iter().zip(&widths).zip(columns) {
            let blanks = " ".repeat(width.saturating_sub(cell.chars().count()));
            line += &if *to_the_right { blanks + cell } else { cell.clone() + &blanks };
            line += "  ";
        }
        text += line.trim_end();
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn answers_read_well() {
        for (value, expected) in [
            (json!({}), ""),
            (json!(true), "yes\n"),
            (json!({"running": true, "status": "running"}), "running: yes\nstatus: running\n"),
            (json!([{"name": "a"}, {"name": "b"}]), "a\nb\n"),
            (
                json!([{"id": "j", "len": 5}, {"id": "long", "len": 1000, "error": "x\u{1b}y"}]),
                "id     len  error\nj        5  -\nlong  1000  x?y\n",
            ),
            (
                json!([{"a": {"b": [1, 2], "c": []}, "d": null}, {"a": {}}]),
                "a:\n  b: 1, 2\n  c: \nd: -\n\na: -\n",
            ),
        ] {
            assert_eq!(text(&value), expected, "{value}");
        }
    }
}
