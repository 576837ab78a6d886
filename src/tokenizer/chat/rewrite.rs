//! Puts questions to the budget into a template: wherever it makes or reads values without a filter, a function
//! or a method, which ask by themselves.
//!
//! minijinja runs operators without asking anyone. So the parsed template is built anew with calls around them.
//! Their names hold a blank, which no name in a template can.

use minijinja::Value;
use minijinja::machinery::{Span, ast};

use ast::{BinOpKind, CallArg, Expr, Spanned, Stmt};

/// Gives back the value that it has read.
pub(super) const LOOK: &str = "look at";
/// The same, of a text only.
pub(super) const TOUCH: &str = "touch it";
/// The same, of what is iterated over; of `none`, an error.
pub(super) const ITERATE: &str = "iterate over it";
/// Gives back a value that may be kept in another.
pub(super) const KEEP: &str = "keep it";
/// Gives back a new list or map, whose parts it looks at.
pub(super) const HOLD: &str = "hold it";
/// Gives back what can be iterated over as a list.
pub(super) const SETTLE: &str = "settle it";
/// The operators that make something.
pub(super) const CONCAT: &str = "concat them";
pub(super) const ADD: &str = "add them";
pub(super) const MULTIPLY: &str = "multiply them";

/// The same template, which asks.
pub(super) fn rewrite<'a>(stmt: &Stmt<'a>) -> Stmt<'a> {
    match stmt {
        Stmt::Template(s) => Stmt::Template(same(s, ast::Template { children: body(&s.children) })),
        Stmt::EmitExpr(s) => Stmt::EmitExpr(same(s, ast::EmitExpr { expr: expr(&s.expr) })),
        // As an expression, so that it goes through the formatter, which counts what is written.
        Stmt::EmitRaw(s) => {
            let value = Value::from_safe_string(s.raw.to_owned());
            let expr = Expr::Const(same(s, ast::Const { value }));
            Stmt::EmitExpr(same(s, ast::EmitExpr { expr }))
        }
        Stmt::ForLoop(s) => Stmt::ForLoop(same(
            s,
            ast::ForLoop {
                target: target(&s.target),
                iter: assigned(&s.target, iterated(expr(&s.iter))),
                filter_expr: s.filter_expr.as_ref().map(expr),
                recursive: s.recursive,
                body: body(&s.body),
                else_body: body(&s.else_body),
            },
        )),
        Stmt::IfCond(s) => Stmt::IfCond(same(
            s,
            ast::IfCond {
                expr: expr(&s.expr),
                true_body: body(&s.true_body),
                false_body: body(&s.false_body),
            },
        )),
        Stmt::WithBlock(s) => {
            let assignments = s.assignments.iter();
            let assignments = assignments.map(|(to, from)| (target(to), assigned(to, expr(from))));
            let assignments = assignments.collect();
            Stmt::WithBlock(same(s, ast::WithBlock { assignments, body: body(&s.body) }))
        }
        Stmt::Set(s) => Stmt::Set(same(
            s,
            ast::Set { target: target(&s.target), expr: assigned(&s.target, expr(&s.expr)) },
        )),
        Stmt::SetBlock(s) => Stmt::SetBlock(same(
            s,
            ast::SetBlock {
                target: target(&s.target),
                filter: s.filter.as_ref().map(expr),
                body: body(&s.body),
            },
        )),
        Stmt::AutoEscape(s) => Stmt::AutoEscape(same(
            s,
            ast::AutoEscape { enabled: expr(&s.enabled), body: body(&s.body) },
        )),
        Stmt::FilterBlock(s) => Stmt::FilterBlock(same(
            s,
            ast::FilterBlock { filter: expr(&s.filter), body: body(&s.body) },
        )),
        Stmt::Block(s) => Stmt::Block(same(
            s,
            ast::Block { name: s.name, required: s.required, body: body(&s.body) },
        )),
        Stmt::Import(s) => {
            Stmt::Import(same(s, ast::Import { expr: expr(&s.expr), name: target(&s.name) }))
        }
        Stmt::FromImport(s) => {
            let names = s.names.iter().map(|(name, to)| (target(name), to.as_ref().map(target)));
            let names = names.collect();
            Stmt::FromImport(same(s, ast::FromImport { expr: expr(&s.expr), names }))
        }
        Stmt::Extends(s) => Stmt::Extends(same(s, ast::Extends { name: expr(&s.name) })),
        Stmt::Include(s) => Stmt::Include(same(
            s,
            ast::Include { name: expr(&s.name), ignore_missing: s.ignore_missing },
        )),
        Stmt::Macro(s) => Stmt::Macro(declaration(s)),
        Stmt::CallBlock(s) => Stmt::CallBlock(same(
            s,
            ast::CallBlock { call: call(&s.call), macro_decl: declaration(&s.macro_decl) },
        )),
        Stmt::Continue(s) => Stmt::Continue(same(s, ast::Continue)),
        Stmt::Break(s) => Stmt::Break(same(s, ast::Break)),
        Stmt::Do(s) => Stmt::Do(same(s, ast::Do { call: call(&s.call) })),
    }
}

fn body<'a>(statements: &[Stmt<'a>]) -> Vec<Stmt<'a>> {
    statements.iter().map(rewrite).collect()
}

fn declaration<'a>(s: &Spanned<ast::Macro<'a>>) -> Spanned<ast::Macro<'a>> {
    same(
        s,
        ast::Macro {
            name: s.name,
            args: s.args.iter().map(target).collect(),
            defaults: s.defaults.iter().map(expr).collect(),
            body: body(&s.body),
        },
    )
}

/// What is assigned to: names, lists of names, attributes of a namespace.
fn target<'a>(to: &Expr<'a>) -> Expr<'a> {
    match to {
        Expr::List(s) => {
            Expr::List(same(s, ast::List { items: s.items.iter().map(target).collect() }))
        }
        Expr::Tuple(s) => {
            Expr::Tuple(same(s, ast::Tuple { items: s.items.iter().map(target).collect() }))
        }
        other => expr(other),
    }
}

/// What is assigned, which a namespace keeps if it is assigned to an attribute.
fn assigned<'a>(to: &Expr<'a>, from: Expr<'a>) -> Expr<'a> {
    let kept = match to {
        Expr::Var(_) => false,
        Expr::List(list) => list.items.iter().any(|item| !matches!(item, Expr::Var(_))),
        Expr::Tuple(list) => list.items.iter().any(|item| !matches!(item, Expr::Var(_))),
        _ => true,
    };
    if kept { wrap(KEEP, from) } else { from }
}

fn expr<'a>(e: &Expr<'a>) -> Expr<'a> {
    let all = |items: &[Expr<'a>]| items.iter().map(expr).collect();
    match e {
        Expr::Var(s) => Expr::Var(same(s, ast::Var { id: s.id })),
        Expr::Const(s) => Expr::Const(same(s, ast::Const { value: s.value.clone() })),
        Expr::Slice(s) => {
            let slice = ast::Slice {
                expr: wrap(TOUCH, expr(&s.expr)),
                start: s.start.as_ref().map(expr),
                stop: s.stop.as_ref().map(expr),
                step: s.step.as_ref().map(expr),
            };
            wrap(SETTLE, Expr::Slice(same(s, slice)))
        }
        Expr::UnaryOp(s) => {
            #[allow(clippy::needless_match, reason = "it is neither Copy nor Clone")]
            let op = match s.op {
                ast::UnaryOpKind::Not => ast::UnaryOpKind::Not,
                ast::UnaryOpKind::Neg => ast::UnaryOpKind::Neg,
            };
            Expr::UnaryOp(same(s, ast::UnaryOp { op, expr: expr(&s.expr) }))
        }
        Expr::BinOp(s) => binary(s),
        Expr::Compare(s) => {
            let compare =
                |op: &ast::CompareOp<'a>| ast::CompareOp { op: op.op, expr: look(&op.expr) };
            let ops = s.ops.iter().map(compare).collect();
            Expr::Compare(same(s, ast::Compare { expr: look(&s.expr), ops }))
        }
        Expr::IfExpr(s) => Expr::IfExpr(same(
            s,
            ast::IfExpr {
                test_expr: expr(&s.test_expr),
                true_expr: expr(&s.true_expr),
                false_expr: s.false_expr.as_ref().map(expr),
            },
        )),
        Expr::Filter(s) => Expr::Filter(same(
            s,
            ast::Filter {
                name: s.name,
                expr: s.expr.as_ref().map(expr),
                args: args(&s.args, expr),
            },
        )),
        Expr::Test(s) => Expr::Test(same(
            s,
            ast::Test { name: s.name, expr: expr(&s.expr), args: args(&s.args, expr) },
        )),
        Expr::GetAttr(s) => {
            Expr::GetAttr(same(s, ast::GetAttr { expr: expr(&s.expr), name: s.name }))
        }
        Expr::GetItem(s) => Expr::GetItem(same(
            s,
            ast::GetItem {
                expr: wrap(TOUCH, expr(&s.expr)),
                subscript_expr: look(&s.subscript_expr),
            },
        )),
        Expr::Call(s) => Expr::Call(call(s)),
        Expr::List(s) if s.as_const().is_none() => {
            wrap(HOLD, Expr::List(same(s, ast::List { items: all(&s.items) })))
        }
        Expr::List(s) => Expr::List(same(s, ast::List { items: all(&s.items) })),
        Expr::Tuple(s) if s.as_const().is_none() => {
            wrap(HOLD, Expr::Tuple(same(s, ast::Tuple { items: all(&s.items) })))
        }
        Expr::Tuple(s) => Expr::Tuple(same(s, ast::Tuple { items: all(&s.items) })),
        Expr::Map(s) => {
            let keys = s.keys.iter().map(look).collect();
            let map = Expr::Map(same(s, ast::Map { keys, values: all(&s.values) }));
            if s.as_const().is_none() { wrap(HOLD, map) } else { map }
        }
    }
}

fn binary<'a>(s: &Spanned<ast::BinOp<'a>>) -> Expr<'a> {
    let operator = |name| {
        let operands = [expr(&s.left), expr(&s.right)].map(CallArg::Pos);
        ask(name, Vec::from(operands), s.span())
    };
    let (left, right) = match s.op {
        BinOpKind::Concat => return operator(CONCAT),
        BinOpKind::Add => return operator(ADD),
        BinOpKind::Mul => return operator(MULTIPLY),
        BinOpKind::ScAnd | BinOpKind::ScOr => (expr(&s.left), expr(&s.right)),
        _ => (look(&s.left), look(&s.right)),
    };
    Expr::BinOp(same(s, ast::BinOp { op: s.op, left, right }))
}

fn call<'a>(s: &Spanned<ast::Call<'a>>) -> Spanned<ast::Call<'a>> {
    // `loop.changed(x)` keeps x.
    let changed = matches!(&s.expr, Expr::GetAttr(attr) if attr.name == "changed");
    let keep: fn(&Expr<'a>) -> Expr<'a> = |e| wrap(KEEP, expr(e));
    let args = args(&s.args, if changed { keep } else { expr });
    same(s, ast::Call { expr: expr(&s.expr), args })
}

fn args<'a>(args: &[CallArg<'a>], expr: fn(&Expr<'a>) -> Expr<'a>) -> Vec<CallArg<'a>> {
    let rebuilt = args.iter().map(|arg| match arg {
        CallArg::Pos(e) => CallArg::Pos(expr(e)),
        CallArg::Kwarg(name, e) => CallArg::Kwarg(name, expr(e)),
        CallArg::PosSplat(e) => CallArg::PosSplat(wrap(LOOK, expr(e))),
        CallArg::KwargSplat(e) => CallArg::KwargSplat(wrap(LOOK, expr(e))),
    });
    rebuilt.collect()
}

/// An operand that is read.
fn look<'a>(e: &Expr<'a>) -> Expr<'a> {
    wrap(LOOK, expr(e))
}

/// Constants are no longer than the template.
/// What a loop runs over, a constant too: `none` is one.
fn iterated<'a>(e: Expr<'a>) -> Expr<'a> {
    let span = e.span();
    ask(ITERATE, vec![CallArg::Pos(e)], span)
}

fn wrap<'a>(name: &'a str, e: Expr<'a>) -> Expr<'a> {
    if matches!(e, Expr::Const(_)) {
        return e;
    }
    let span = e.span();
    ask(name, vec![CallArg::Pos(e)], span)
}

fn ask<'a>(name: &'a str, args: Vec<CallArg<'a>>, span: Span) -> Expr<'a> {
    let expr = Expr::Var(Spanned::new(ast::Var { id: name }, span));
    Expr::Call(Spanned::new(ast::Call { expr, args }, span))
}

fn same<A, B>(old: &Spanned<A>, new: B) -> Spanned<B> {
    Spanned::new(new, old.span())
}
