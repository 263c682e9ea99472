import{d as o,r as a}from"./index-DbVWwu_m.js";var p=a("<h1>Support sets</h1>");function e(r){var t=p();o(r,t)}export{e as default};
